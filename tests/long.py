"""What runs at full length alone, under ``TORCHWEFT_SOAK=1``.

Each is a variation of something that always runs: another number format, stage, way to launch or
number of devices. Prefixes of node ids below ``tests/``.
"""

from __future__ import annotations

__all__ = ["LONG"]

LONG = (
    "conformance/test_strategies.py::TestDDPThatLooksForUnusedParameters",
    "conformance/test_strategies.py::TestFSDPByParts",
    "conformance/test_strategies.py::TestFSDPInBFloat16",
    "conformance/test_strategies.py::TestFSDPInFloat16",
    "core/test_function_launchers.py::test_launches_in_a_row[forkserver]",
    "core/test_function_launchers.py::test_launches_in_a_row[spawn]",
    "cuda/test_one_gpu.py::test_two_ranks_end_where_one_does[bf16-mixed-0.1-cpu]",
    "deepspeed/test_activations.py::test_modules_are_chosen_as_with_fsdp[Block0]",
    "deepspeed/test_activations.py::test_modules_are_chosen_as_with_fsdp[choice1]",
    "deepspeed/test_conformance.py::TestStage0",
    "deepspeed/test_conformance.py::TestStage1",
    "deepspeed/test_conformance.py::TestStage2InBFloat16",
    "deepspeed/test_conformance.py::TestStage3::",
    "deepspeed/test_folder.py::test_a_script_of_deepspeed_s_goes_on_here[0]",
    "deepspeed/test_folder.py::test_a_script_of_deepspeed_s_goes_on_here[1]",
    "deepspeed/test_folder.py::test_the_model_alone[2]",
    "deepspeed/test_folder.py::test_the_next_losses_are_the_same[0-",
    "deepspeed/test_folder.py::test_the_next_losses_are_the_same[1-bf16",
    "deepspeed/test_folder.py::test_the_next_losses_are_the_same[2-bf16",
    "deepspeed/test_folder.py::test_the_next_losses_are_the_same[3-32",
    "deepspeed/test_offload.py::test_a_checkpoint_of_what_is_offloaded_is_anybodys[deepspeed_stage_1",
    "deepspeed/test_offload.py::test_a_checkpoint_of_what_is_offloaded_is_anybodys[deepspeed_stage_2",
    "deepspeed/test_offload.py::test_deepspeeds_optimizer_steps_as_torchs[deepspeed_stage_1",
    "deepspeed/test_offload.py::test_deepspeeds_optimizer_steps_as_torchs[deepspeed_stage_2",
    "deepspeed/test_offload.py::test_in_16_bits_it_steps_as_what_is_not_offloaded[1]",
    "deepspeed/test_offload.py::test_in_16_bits_it_steps_as_what_is_not_offloaded[2]",
    "deepspeed/test_offload.py::test_what_is_offloaded_goes_on_from_anybodys_checkpoint[single",
    "endtoend/test_command_lines.py::test_a_script_with_its_own_command_line[click]",
    "endtoend/test_dry_run.py::test_a_dry_run[fork]",
    "endtoend/test_dry_run.py::test_a_dry_run[fresh]",
    "endtoend/test_dry_run.py::test_a_dry_run[spawn]",
    "endtoend/test_failure.py::test_a_rank_exits[python-os._exit]",
    "endtoend/test_failure.py::test_a_rank_exits[torchweft run-os._exit]",
    "endtoend/test_failure.py::test_a_rank_raises[again]",
    "endtoend/test_failure.py::test_a_rank_raises[fork]",
    "endtoend/test_failure.py::test_a_rank_raises[forkserver]",
    "endtoend/test_examples.py::test_a_language_model_learns_and_writes[torchweft run-bf16-mixed]",
    "endtoend/test_place.py::test_the_same_place[again]",
    "endtoend/test_place.py::test_the_same_place[fork]",
    "endtoend/test_place.py::test_the_same_place[forkserver]",
    "endtoend/test_should_stop.py::test_all_ranks_stop_at_the_same_step[no preload-",
    "endtoend/test_should_stop.py::test_all_ranks_stop_at_the_same_step[torchweft run-12",
    "endtoend/test_watchdog.py::test_it_says_which_and_who_did_not_come[fresh]",
    "endtoend/test_output.py::test_a_file_for_each_rank_and_lines_behind_their_rank[fresh]",
    "xla/test_graphs.py::test_a_transfer_in_every_step_is_told_with_its_line[scale = loss.cpu()]",
    "xla/test_graphs.py::test_fifty_steps_and_an_evaluation[single_xla-1]",
    "xla/test_graphs.py::test_fifty_steps_and_an_evaluation[xla-1]",
    "xla/test_requests.py::test_a_batch_without_a_tensor_names_collate_fn[object()",
    "xla/test_requests.py::test_a_batch_without_a_tensor_names_collate_fn[[{",
    "xla/test_strategy.py::test_a_checkpoint_of_ddp_goes_on_here_and_back[state.ckpt-",
)
