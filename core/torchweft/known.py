"""Data only: which distribution provides a well-known name that is not installed."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["COMMON", "KNOWN", "OTHER_WORDS"]

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
    **{
        ("strategy", name): "torchweft-xla"
        for name in ("xla", "xla_fsdp", "xla_replicas", "single_xla")
    },
    ("launcher", "xla_launch"): "torchweft-xla",
    **{("precision", name): "torchweft-cuda" for name in ("16-mixed", "16")},
    ("launcher", "ray"): "torchweft-ray",
}

#: (kind, word) -> what may be meant by a word of other libraries that says too little.
OTHER_WORDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    **{("precision", word): ("16-mixed", "16-true") for word in ("fp16", "float16", "half")},
    **{("precision", word): ("bf16-mixed", "bf16-true") for word in ("bfloat16", "bfp16")},
    ("precision", "amp"): ("bf16-mixed", "16-mixed"),
    ("precision", "fp32"): ("32-true",),
    ("precision", "float32"): ("32-true",),
    ("precision", "fp64"): ("64-true",),
    ("precision", "float64"): ("64-true",),
    ("precision", "double"): ("64-true",),
}
