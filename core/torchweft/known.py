"""Data only: which distribution provides a well-known name that is not installed."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["COMMON", "KNOWN"]

#: By kind, the name to suggest where nothing that is installed will do.
COMMON: Mapping[str, str] = {"accelerator": "cuda", "strategy": "ddp"}

#: (kind, name) -> the distribution that ``pip install`` takes.
KNOWN: Mapping[tuple[str, str], str] = {
    **{("accelerator", name): "torchweft-cuda" for name in ("cuda", "gpu")},
    **{("accelerator", name): "torchweft-xla" for name in ("xla", "tpu")},
    **{
        ("strategy", name): "torchweft-cuda"
        for name in (
            "ddp",
            "ddp_spawn",
            "ddp_fork",
            "ddp_notebook",
            "ddp_find_unused_parameters_true",
            "fsdp",
            "fsdp_cpu_offload",
        )
    },
    **{
        ("strategy", name): "torchweft-deepspeed"
        for name in (
            "deepspeed",
            "deepspeed_stage_1",
            "deepspeed_stage_1_offload",
            "deepspeed_stage_2",
            "deepspeed_stage_2_offload",
            "deepspeed_stage_3",
            "deepspeed_stage_3_offload",
            "deepspeed_stage_3_offload_nvme",
        )
    },
    **{("strategy", name): "torchweft-xla" for name in ("xla", "xla_fsdp", "single_xla")},
    **{("precision", name): "torchweft-cuda" for name in ("16-mixed", "16")},
    ("launcher", "ray"): "torchweft-ray",
}
