from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

import pytest

from torchweft.catalog import Entry
from torchweft.errors import (
    BrokenPlugin,
    IncompatiblePlan,
    InvalidRequest,
    NameClash,
    NotAvailable,
    TorchweftError,
    UnknownName,
    UnknownOption,
)
from torchweft.handoff import Handoff
from torchweft.manager import Declared
from torchweft.plan import RunPlan, Topology
from torchweft.specs import (
    AcceleratorSpec,
    Detection,
    LauncherSpec,
    PrecisionSpec,
    Preset,
    StrategySpec,
)

if TYPE_CHECKING:
    from tests.core.conftest import World

CORE = "torchweft 0.1.0"
CUDA = "torchweft-cuda 0.1.0"


def names(plan: RunPlan) -> tuple[str, str, str, str]:
    return (
        plan.accelerator.name,
        plan.strategy.name,
        plan.precision.name,
        plan.launcher.name,
    )


def refused(world: World, error: type[TorchweftError], **asked: Any) -> str:
    """The words of the error that a request ends in."""
    with pytest.raises(error) as caught:
        world.resolve(**asked)
    assert type(caught.value) is error
    return str(caught.value)


def torchrun(world_size: int | None = 2, per_node: int | None = 2) -> Detection:
    return Detection(
        reason="torchrun started this process",
        world_size=world_size,
        processes_per_node=per_node,
    )


# -- what is left open -------------------------------------------------------------------------


def test_one_process_on_the_processor(world: World) -> None:
    plan = world.resolve()
    assert names(plan) == ("cpu", "single_device", "32-true", "inline")
    assert plan.topology == Topology(num_nodes=1, processes_per_node=1, devices=(0,))
    assert [decision.wanted for decision in plan.decisions] == ["auto"] * 4
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_two_processes_on_the_processor(world: World) -> None:
    plan = world.resolve(devices=2)
    assert names(plan) == ("cpu", "ddp", "32-true", "script")
    assert plan.topology == Topology(num_nodes=1, processes_per_node=2, devices=(0, 1))


def test_all_gpus_where_there_are_some(world: World) -> None:
    world.gpus = 4
    plan = world.resolve()
    assert names(plan) == ("cuda", "ddp", "32-true", "script")
    assert plan.topology.devices == (0, 1, 2, 3)
    assert names(world.resolve(devices=[3])) == ("cuda", "single_device", "32-true", "inline")


def test_every_decision_says_why_and_what_was_rejected(world: World) -> None:
    accelerator, strategy, _, launcher = world.resolve(devices=2, strategy="ddp").decisions
    assert (accelerator.provider, accelerator.why) == (
        CORE,
        "the only one for 'auto' that can be used",
    )
    assert [(r.name, r.provider, r.reason, r.hint) for r in accelerator.rejected] == [
        ("cuda", CUDA, "there is no NVIDIA driver", "install the driver"),
        ("mps", CORE, "this is not an Apple computer", ""),
    ]
    assert (strategy.wanted, strategy.why, strategy.provider) == ("ddp", "named", CUDA)
    assert [(r.name, r.reason) for r in launcher.rejected] == [
        ("inline", "it makes one process, and the plan has 2"),
        ("torchrun", "it starts the script from outside, and did not start this one"),
    ]


def test_of_several_the_highest_priority(world: World) -> None:
    decision = world.resolve().decisions[1]
    assert (decision.spec.name, decision.why) == (
        "single_device",
        "highest priority of 2 for 'auto' that can be used",
    )


def test_of_equal_priorities_the_most_specific(world: World) -> None:
    world.declare(StrategySpec(name="own", target="a:B", priority=50, devices=("cpu",)))
    assert world.resolve(devices=2).strategy.name == "own"


def test_equal_priorities_that_nothing_decides(world: World) -> None:
    world.declare(StrategySpec(name="own", target="a:B", priority=50, devices=("cpu", "cuda")))
    assert refused(world, NameClash, devices=2) == (
        f"strategy='auto' could be 'ddp' ({CUDA}) or 'own' (torchweft-acme 0.1), which declare "
        "the same priority; name the strategy that you want"
    )
    assert world.resolve(devices=2, strategy="own").strategy.name == "own"


def test_what_has_no_priority_is_never_picked(world: World) -> None:
    world.declare(StrategySpec(name="own", target="a:B"))
    assert world.resolve(devices=2).strategy.name == "ddp"


def test_nothing_that_could_be_picked(world: World) -> None:
    world.without("cuda")
    assert refused(world, NotAvailable, devices=2) == (
        f"no strategy can be used here: 'single_device' ({CORE}): it runs one process on one "
        "device, and there are 2 to use; 'ddp' is in a package that is not installed; "
        "try: pip install torchweft-cuda"
    )
    world.without("builtin")
    assert refused(world, NotAvailable) == (
        "no accelerator can be used here: nothing that is installed is meant for 'auto'; "
        "'cuda' is in a package that is not installed; try: pip install torchweft-cuda"
    )


def test_the_order_of_installation_does_not_matter(world: World) -> None:
    plan = world.resolve(devices=2)
    world.plugins.reverse()
    assert world.resolve(devices=2) == plan


def test_a_broken_plugin_breaks_nothing_and_is_noted(world: World) -> None:
    world.plugins.append(
        Declared(plugin="acme", distribution="torchweft-acme", version="0.1", error="OSError: x")
    )
    plan = world.resolve(devices=2)
    assert names(plan) == ("cpu", "ddp", "32-true", "script")
    assert plan.notes == ("plugin 'acme' (torchweft-acme 0.1) failed to load: OSError: x",)


def test_without_options_no_class_is_imported(world: World) -> None:
    world.declare(StrategySpec(name="own", target="a_module_that_is_not_there:Own"))
    assert world.resolve(devices=2, strategy="own").strategy.name == "own"
    assert "a_module_that_is_not_there" not in sys.modules


# -- names that cannot be had ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"accelerator": "cpuu"},
            "no accelerator is called 'cpuu'; did you mean 'cpu'? known here: auto, cpu, cuda, mps",
        ),
        (
            {"strategy": "deepsped"},
            (
                "no strategy is called 'deepsped'; did you mean 'deepspeed'? "
                "known here: auto, ddp, single_device"
            ),
        ),
        (
            {"precision": "16-mix"},
            (
                "no precision is called '16-mix'; did you mean '16-mixed'? "
                "known here: 16-mixed, 32-true, auto, bf16-mixed"
            ),
        ),
        (
            {"launcher": "torchrum"},
            (
                "no launcher is called 'torchrum'; did you mean 'torchrun'? "
                "known here: auto, fork, inline, script, spawn, torchrun"
            ),
        ),
    ],
)
def test_an_unknown_name(world: World, asked: dict[str, str], words: str) -> None:
    assert refused(world, UnknownName, **asked) == words


def test_an_unknown_name_in_a_variable(world: World) -> None:
    words = refused(world, UnknownName, environ={"TORCHWEFT_LAUNCHER": "forc"})
    assert words.startswith(
        "no launcher is called 'forc' (TORCHWEFT_LAUNCHER); did you mean 'fork'?"
    )


@pytest.mark.parametrize(
    ("kind", "name", "distribution"),
    [
        ("accelerator", "tpu", "torchweft-xla"),
        ("strategy", "deepspeed", "torchweft-deepspeed"),
        ("launcher", "ray", "torchweft-ray"),
    ],
)
def test_a_name_in_a_package_that_is_not_installed(
    world: World, kind: str, name: str, distribution: str
) -> None:
    assert refused(world, NotAvailable, **{kind: name}) == (
        f"{kind} '{name}' is in a package that is not installed; try: pip install {distribution}"
    )


def test_a_name_that_a_broken_plugin_might_have_provided(world: World) -> None:
    world.plugins.append(
        Declared(
            plugin="acme",
            distribution="torchweft-acme",
            version="0.1",
            error="ModuleNotFoundError: No module named 'acme_comm'",
        )
    )
    assert refused(world, BrokenPlugin, strategy="acme").endswith(
        "plugin 'acme' (torchweft-acme 0.1) failed to load: "
        "ModuleNotFoundError: No module named 'acme_comm'"
    )


def test_cuda_without_a_gpu(world: World) -> None:
    assert refused(world, NotAvailable, accelerator="cuda") == (
        f"accelerator 'cuda' cannot be used here: 'cuda' ({CUDA}): there is no NVIDIA driver; "
        "install the driver; what can be used: cpu"
    )


def test_an_alias_of_several_that_are_not_there(world: World) -> None:
    assert refused(world, NotAvailable, accelerator="gpu") == (
        f"accelerator 'gpu' cannot be used here: 'cuda' ({CUDA}): there is no NVIDIA driver; "
        f"install the driver; 'mps' ({CORE}): this is not an Apple computer; "
        "what can be used: cpu"
    )
    world.without("cuda")
    assert refused(world, NotAvailable, accelerator="gpu") == (
        f"accelerator 'gpu' cannot be used here: 'mps' ({CORE}): this is not an Apple computer; "
        "'gpu' is in a package that is not installed; try: pip install torchweft-cuda; "
        "what can be used: cpu"
    )


def test_an_alias_of_several_of_which_one_is_there(world: World) -> None:
    world.mps = True
    assert world.resolve(accelerator="gpu").accelerator.name == "mps"


def test_an_alias_of_several_that_are_all_there(world: World) -> None:
    world.mps = True
    world.gpus = 1
    assert refused(world, NameClash, accelerator="gpu") == (
        f"accelerator 'gpu' could be 'cuda' ({CUDA}) or 'mps' ({CORE}) here; "
        "write the name of the one that you want"
    )
    # A name is nobody's alias in that case: it is the way out.
    world.declare(AcceleratorSpec(name="gpu", target="a:B", device="npu"))
    assert world.resolve(accelerator="gpu").accelerator.device == "npu"


def test_a_name_that_two_distributions_declare(world: World) -> None:
    world.declare(StrategySpec(name="ddp", target="a:B", devices=("cuda", "cpu"), priority=50))
    words = (
        f"strategy 'ddp' is declared by both torchweft-acme 0.1 and {CUDA}, for the same devices "
        "and strategies; uninstall one of them, or leave one out with "
        "TORCHWEFT_DISABLE_PLUGINS=acme or TORCHWEFT_DISABLE_PLUGINS=cuda"
    )
    assert refused(world, NameClash, strategy="ddp") == words
    assert refused(world, NameClash, devices=2) == words
    # Whoever asks for something else is not concerned.
    assert world.resolve(strategy="single_device").strategy.name == "single_device"


# -- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (0, "devices=0 asks for 0 devices; it takes 1 or more"),
        (-5, "devices=-5 asks for -5 devices; it takes 1 or more"),
        ([1, 1], "devices=[1, 1] names device 1 more than once"),
        ([-1, 0], "devices=[-1, 0] has the negative index -1"),
    ],
)
def test_devices_that_mean_nothing(world: World, devices: Any, words: str) -> None:
    assert refused(world, InvalidRequest, devices=devices).startswith(words)


def test_more_devices_than_there_are(world: World) -> None:
    world.gpus = 2
    assert refused(world, NotAvailable, devices=4) == (
        "devices=4 was asked for, but accelerator 'cuda' has 2 (0, 1) here"
    )
    assert refused(world, NotAvailable, devices=[0, 2], accelerator="cuda") == (
        "devices=[0, 2] names device 2, but accelerator 'cuda' has 2 (0, 1) here"
    )


def test_a_named_strategy_of_one_device_takes_one(world: World) -> None:
    world.gpus = 4
    plan = world.resolve(strategy="single_device")
    assert (plan.topology.devices, plan.launcher.name) == ((0,), "inline")


def test_a_strategy_of_one_device_for_several(world: World) -> None:
    assert refused(world, IncompatiblePlan, strategy="single_device", devices=2) == (
        f"strategy 'single_device' cannot be used here: 'single_device' ({CORE}): it runs one "
        "process on one device, and there are 2 to use; what can be used: ddp"
    )
    assert "and there are 3 to use" in refused(
        world, IncompatiblePlan, strategy="single_device", num_nodes="1:3"
    )


# -- what does not go together -----------------------------------------------------------------


def test_a_strategy_that_does_not_serve_the_device(world: World) -> None:
    world.mps = True
    assert refused(world, IncompatiblePlan, accelerator="mps", strategy="ddp") == (
        f"strategy 'ddp' cannot be used here: 'ddp' ({CUDA}): it does not serve device 'mps', "
        "only 'cuda', 'cpu'; what can be used: single_device"
    )


def test_a_precision_that_the_strategy_does_not_serve(world: World) -> None:
    assert refused(world, IncompatiblePlan, strategy="single_device", precision="16-mixed") == (
        f"precision '16-mixed' cannot be used here: '16-mixed' ({CUDA}): it does not serve "
        "strategy 'single_device', only 'ddp'; what can be used: 32-true, bf16-mixed"
    )
    assert world.resolve(strategy="ddp", precision=16).precision.name == "16-mixed"


def test_of_one_name_the_most_specific_that_serves(world: World) -> None:
    world.declare(
        StrategySpec(name="engine", target="a:B"),
        PrecisionSpec(name="bf16-mixed", target="a:Own", strategies=("engine",)),
    )
    assert world.resolve(strategy="engine", precision="bf16-mixed").precision.target == "a:Own"
    plan = world.resolve(strategy="ddp", precision="bf16-mixed")
    assert plan.decisions[2].provider == CORE
    assert [rejected.reason for rejected in plan.decisions[2].rejected] == [
        "it does not serve strategy 'ddp', only 'engine'"
    ]


def test_an_exclusive_strategy_takes_only_what_names_it(world: World) -> None:
    world.declare(
        StrategySpec(name="engine", target="a:B", exclusive=("precision",)),
        PrecisionSpec(name="own", target="a:Own", strategies=("engine",), priority=1),
    )
    assert world.resolve(strategy="engine").precision.name == "own"
    assert refused(world, IncompatiblePlan, strategy="engine", precision="32") == (
        f"precision '32' cannot be used here: '32-true' ({CORE}): strategy 'engine' takes only a "
        "precision made for it; what can be used: own"
    )


def test_an_exclusive_accelerator_takes_only_what_names_it(world: World) -> None:
    world.declare(
        AcceleratorSpec(name="tpu", target="a:B", device="xla", exclusive=("strategy",)),
        StrategySpec(name="own", target="a:B", devices=("xla",), priority=1, processes="one"),
    )
    assert world.resolve(accelerator="tpu").strategy.name == "own"
    assert "accelerator 'tpu' takes only a strategy made for it" in refused(
        world, IncompatiblePlan, accelerator="tpu", strategy="single_device"
    )


def test_plugins_object_to_the_whole_plan_at_once(world: World) -> None:
    asked: list[RunPlan] = []

    def objections(plan: RunPlan) -> list[str]:
        asked.append(plan)
        return ["no even numbers (says a 1)", "no odd ones (says b 1)"]

    assert refused(world, IncompatiblePlan, devices=2, objections=objections) == (
        "no even numbers (says a 1); no odd ones (says b 1)"
    )
    assert [names(plan) for plan in asked] == [("cpu", "ddp", "32-true", "script")]


# -- options and presets -----------------------------------------------------------------------


def test_three_ways_to_ask_for_the_same(world: World) -> None:
    options = {"strategy": {"find_unused_parameters": True}}
    for written in (
        "ddp:find_unused_parameters=true",
        "ddp_find_unused_parameters_true",
        "ddp_find_unused_parameters_true:find_unused_parameters=true",
    ):
        plan = world.resolve(strategy=written, devices=2)
        assert (plan.strategy.name, plan.options) == ("ddp", options)


def test_an_unknown_option_is_answered_with_the_nearest(world: World) -> None:
    assert refused(world, UnknownOption, strategy="ddp:find_unused_paramters=true") == (
        "strategy 'ddp' has no option 'find_unused_paramters'; did you mean "
        "'find_unused_parameters'? options of DDP: bucket_cap_mb, find_unused_parameters, "
        "static_graph"
    )


def test_an_option_of_the_wrong_type(world: World) -> None:
    assert refused(world, InvalidRequest, strategy="ddp:static_graph=1") == (
        "strategy 'ddp' takes static_graph as bool, not 1"
    )


def test_an_option_that_contradicts_its_preset(world: World) -> None:
    assert refused(
        world,
        InvalidRequest,
        strategy="ddp_find_unused_parameters_true:find_unused_parameters=false",
    ) == (
        "strategy 'ddp_find_unused_parameters_true' stands for find_unused_parameters=True, and "
        "the option find_unused_parameters=False contradicts it; write "
        "strategy='ddp:find_unused_parameters=…'"
    )


def test_options_of_other_kinds_are_checked_too(world: World) -> None:
    assert "launcher 'fork' has no option 'jobs'" in refused(
        world, UnknownOption, launcher="fork:jobs=2"
    )


def test_options_of_a_class_that_cannot_be_loaded(world: World) -> None:
    world.declare(StrategySpec(name="own", target="a_module_that_is_not_there:Own"))
    assert refused(world, BrokenPlugin, strategy="own:bucket=1") == (
        "torchweft-acme 0.1 declares the target 'a_module_that_is_not_there:Own', which cannot "
        "be loaded: ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    )


# -- launchers ---------------------------------------------------------------------------------


def test_a_preset_brings_its_launcher(world: World) -> None:
    decision = world.resolve(strategy="ddp_spawn", devices=2).decisions[3]
    assert (decision.spec.name, decision.wanted, decision.why) == (
        "spawn",
        "auto",
        "strategy='ddp_spawn' needs it",
    )
    # With the same launcher named beside it, too.
    assert world.resolve(strategy="ddp_spawn", launcher="spawn").launcher.name == "spawn"


def test_a_preset_and_another_launcher(world: World) -> None:
    assert refused(world, IncompatiblePlan, strategy="ddp_spawn", launcher="fork") == (
        "strategy 'ddp_spawn' starts its processes with launcher 'spawn', but launcher 'fork' "
        "was asked for; write strategy='ddp' with launcher='fork'"
    )
    words = refused(
        world,
        IncompatiblePlan,
        strategy="ddp_spawn",
        environ={"TORCHWEFT_LAUNCHER": "fork"},
    )
    assert "launcher 'fork' (TORCHWEFT_LAUNCHER) was asked for" in words


def test_a_preset_whose_launcher_cannot_be_used(world: World) -> None:
    assert refused(world, IncompatiblePlan, strategy="ddp_spawn", num_nodes=2).startswith(
        f"launcher 'spawn' (strategy='ddp_spawn' needs it) cannot be used here: 'spawn' ({CORE}): "
        "it starts processes on this node alone, and the plan has 2 nodes;"
    )


def test_a_preset_whose_launcher_nobody_declares(world: World) -> None:
    world.declare(
        StrategySpec(name="own", target="a:B", presets=(Preset(alias="own_x", launcher="x"),))
    )
    assert "no launcher is called 'x'" in refused(world, UnknownName, strategy="own_x")


def test_a_launcher_of_one_process_for_several(world: World) -> None:
    assert refused(world, IncompatiblePlan, launcher="inline", devices=2) == (
        f"launcher 'inline' cannot be used here: 'inline' ({CORE}): it makes one process, and the "
        "plan has 2; what can be used: fork, script, spawn"
    )


def test_a_launcher_of_several_processes_for_one(world: World) -> None:
    assert refused(world, IncompatiblePlan, launcher="script") == (
        f"launcher 'script' cannot be used here: 'script' ({CORE}): the plan has one process, "
        "which needs no launcher; what can be used: fork, inline, spawn"
    )


def test_a_launcher_outside_that_did_not_start_this_process(world: World) -> None:
    assert refused(world, IncompatiblePlan, launcher="torchrun", devices=2) == (
        f"launcher 'torchrun' cannot be used here: 'torchrun' ({CORE}): it starts the script from "
        "outside, and did not start this one; what can be used: fork, script, spawn"
    )


def test_several_nodes_need_a_launcher_outside(world: World) -> None:
    words = refused(world, IncompatiblePlan, num_nodes=2, devices=2)
    assert words.startswith("no launcher can be used here: ")
    assert (
        "'script' (torchweft 0.1.0): it starts processes on this node alone, and the plan has 2 "
        "nodes; start the script with 'torchweft run --num-nodes … --devices …'"
    ) in words
    world.outside = torchrun(4, 2)
    assert world.resolve(num_nodes=2, devices=2).launcher.name == "torchrun"


def test_a_launcher_that_is_detected(world: World) -> None:
    world.outside = torchrun(4, 2)
    plan = world.resolve()
    assert names(plan) == ("cpu", "ddp", "32-true", "torchrun")
    assert plan.topology == Topology(num_nodes=2, processes_per_node=2, devices=(0, 1))
    assert plan.decisions[3].why == "detected: torchrun started this process"
    assert world.resolve(launcher="torchrun", devices=2, num_nodes=2).topology == plan.topology


def test_a_launcher_that_knows_that_what_it_made_is_no_run(world: World) -> None:
    world.outside = Detection(
        reason="torchrun started 3 processes", world_size=3, objection="2 here; start 4"
    )
    assert refused(world, InvalidRequest) == "torchrun started 3 processes, but 2 here; start 4"


def test_a_detected_launcher_outranks_a_preset(world: World) -> None:
    world.outside = torchrun()
    assert world.resolve(strategy="ddp_spawn").launcher.name == "torchrun"


def test_a_detected_launcher_against_an_explicit_one(world: World) -> None:
    world.outside = torchrun()
    assert refused(world, IncompatiblePlan, launcher="spawn") == (
        "launcher 'spawn' was asked for, but torchrun started this process; leave launcher out, "
        "or start the script with python"
    )


def test_one_process_from_outside_becomes_several_where_that_is_asked_for(world: World) -> None:
    world.outside = torchrun(1, 1)
    plan = world.resolve(launcher="script", devices=2, strategy="ddp")
    assert (plan.launcher.name, plan.topology.world_size) == ("script", 2)
    reasons = {rejected.name: rejected.reason for rejected in plan.decisions[3].rejected}
    assert reasons["torchrun"] == (
        "torchrun started this process, once, and launcher 'script' was asked for"
    )
    assert world.resolve().launcher.name == "torchrun"


def test_another_number_of_processes_than_the_launcher_made(world: World) -> None:
    world.outside = torchrun()
    assert refused(world, InvalidRequest, devices=4, strategy="ddp") == (
        "devices=4 with strategy 'ddp' needs 4 process(es) per node, but torchrun started this "
        "process with 2 per node; make the two equal, or leave devices out"
    )
    assert refused(world, InvalidRequest, num_nodes=2) == (
        "num_nodes=2 was asked for, but torchrun started this process on 1 node(s); make the two "
        "equal, or leave num_nodes out"
    )


def test_a_detected_launcher_that_does_not_fit(world: World) -> None:
    world.plugins[0] = Declared(
        plugin="builtin",
        distribution="torchweft",
        version="0.1.0",
        specs=(
            *(s for s in world.plugins[0].specs if s.name != "torchrun"),
            LauncherSpec(
                name="torchrun",
                target="a:B",
                detect="example_backend:torchrun",
                devices=("cuda",),
                outside=True,
            ),
        ),
    )
    world.outside = torchrun()
    assert refused(world, IncompatiblePlan) == (
        f"torchrun started this process, but launcher 'torchrun' ({CORE}) does not fit: it does "
        "not serve device 'cpu', only 'cuda'"
    )


def test_a_detection_that_fails_breaks_nothing(world: World) -> None:
    world.declare(
        LauncherSpec(name="pool", target="a:B", detect="example_backend:gone", priority=10)
    )
    plan = world.resolve(devices=2)
    assert plan.launcher.name == "script"
    assert any(
        rejected.name == "pool" and "has no attribute 'gone'" in rejected.reason
        for rejected in plan.decisions[3].rejected
    )
    assert "has no attribute 'gone'" in refused(world, IncompatiblePlan, launcher="pool")


# -- flags and the environment -----------------------------------------------------------------


def flags(**given: str) -> dict[str, str]:
    return Handoff(run_id="run", flags=given, pid=os.getpid()).to_environ()


def test_flags_are_part_of_the_request(world: World) -> None:
    plan = world.resolve(environ=flags(devices="2", strategy="ddp_spawn"), accelerator="cpu")
    assert names(plan) == ("cpu", "ddp", "32-true", "spawn")


def test_a_flag_and_an_argument_that_disagree(world: World) -> None:
    assert refused(world, InvalidRequest, environ=flags(strategy="ddp_spawn"), strategy="ddp") == (
        "--strategy says 'ddp_spawn' and the script says Fabric(strategy='ddp'); leave one of "
        "them out, or make them equal"
    )


def test_an_error_names_the_flag_that_asked(world: World) -> None:
    assert refused(world, NotAvailable, environ=flags(accelerator="cuda")).startswith(
        f"accelerator 'cuda' (--accelerator) cannot be used here: 'cuda' ({CUDA}): there is no"
    )


# -- objects of the user -----------------------------------------------------------------------


def ddp(world: World) -> dict[str, Entry]:
    return {"strategy": world.catalog.named("strategy", "ddp")[0]}


def test_an_object_is_taken_as_it_is(world: World) -> None:
    plan = world.resolve(given=ddp(world))
    assert names(plan) == ("cpu", "ddp", "32-true", "inline")
    assert (plan.decisions[1].wanted, plan.decisions[1].why) == ("an object of that class", "named")


def test_an_object_of_a_class_that_no_spec_names(world: World) -> None:
    own = Entry(
        spec=StrategySpec(name="mine", target="m:Mine", devices=("cuda",)),
        provider="the class Mine",
    )
    assert refused(world, IncompatiblePlan, given={"strategy": own}) == (
        "the strategy object 'mine' (the class Mine) cannot be used here: 'mine' (the class "
        "Mine): it does not serve device 'cpu', only 'cuda'; what can be used: ddp, single_device"
    )


def test_an_object_and_the_same_name_agree(world: World) -> None:
    plan = world.resolve(given=ddp(world), environ=flags(strategy="ddp_spawn", devices="2"))
    assert names(plan) == ("cpu", "ddp", "32-true", "spawn")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "single_device",
            (
                "--strategy says 'single_device', and the script made the strategy "
                f"object 'ddp' ({CUDA}); leave one of them out"
            ),
        ),
        ("ddp:static_graph=true", "--strategy says 'ddp:static_graph=True', and the script made"),
        ("ddp_find_unused_parameters_true", "says 'ddp_find_unused_parameters_true:find_unused_"),
    ],
)
def test_an_object_and_something_else(world: World, flag: str, words: str) -> None:
    assert words in refused(world, InvalidRequest, given=ddp(world), environ=flags(strategy=flag))


def test_a_launcher_object_beside_a_preset(world: World) -> None:
    fork = {"launcher": world.catalog.named("launcher", "fork")[0]}
    assert world.resolve(given=fork, strategy="ddp", devices=2).launcher.name == "fork"
    assert refused(world, IncompatiblePlan, given=fork, strategy="ddp_spawn") == (
        "strategy 'ddp_spawn' starts its processes with launcher 'spawn', but the launcher object "
        f"'fork' ({CORE}) was asked for; write strategy='ddp' with launcher='fork'"
    )
    world.outside = torchrun()
    assert refused(world, IncompatiblePlan, given=fork) == (
        f"the launcher object 'fork' ({CORE}) was asked for, but torchrun started this process; "
        "leave launcher out, or start the script with python"
    )
