"""The configuration that DeepSpeed is given, and whether it knows all that is in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = ["check_known", "complete"]


def complete(config: Mapping[str, Any], blocks: Mapping[str, Any], size: int) -> dict[str, Any]:
    """``config`` with what follows from the plan and the model.

    Args:
        config: what the options say.
        blocks: those of the precision.
        size: elements of all parameters; no buffer for gradients need be larger, and at stage 3,
            where it stays, a quarter of what a process has of them is enough.
    """
    zero = dict(config["zero_optimization"])
    if "reduce_bucket_size" not in zero:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        default = DeepSpeedZeroConfig.model_fields["reduce_bucket_size"].default
        most = size // (4 * dist.get_world_size()) if zero["stage"] == 3 else size
        zero["reduce_bucket_size"] = max(1, min(int(default), most))
    return {
        **config,
        **blocks,
        "zero_optimization": zero,
        # The loop of the user is told of one micro-batch at a time, and says which closes a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


def check_known(config: Mapping[str, Any]) -> None:
    """Raise ``InvalidRequest`` for a key that DeepSpeed does not read, with the nearest known.

    DeepSpeed ignores such keys at the top, and has words of its own for those further inside.
    """
    _check(config, _read_by_deepspeed(), "")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = config["zero_optimization"]
    _check(zero, _fields(DeepSpeedZeroConfig), "zero_optimization.")
    for key, model in (
        ("offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("offload_param", DeepSpeedZeroOffloadParamConfig),
    ):
        _check(zero.get(key) or {}, _fields(model), f"zero_optimization.{key}.")


def _check(block: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for key in block:
        if key not in known:
            near = did_you_mean(key, known) or ";"
            raise InvalidRequest(
                f"strategy 'deepspeed' was given config= with '{where}{key}', which DeepSpeed "
                f"does not know{near} it knows {', '.join(known)}"
            )


def _fields(model: Any) -> set[str]:
    fields = model.model_fields.items()
    return {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}


def _read_by_deepspeed() -> set[str]:
    """The keys at the top of a configuration, by what DeepSpeed looks for in one."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(_Listening({"train_micro_batch_size_per_gpu": 1}, asked))
    return asked


class _Listening(dict[str, Any]):
    """A dict that notes for which keys it is asked."""

    def __init__(self, content: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(content)
        self._asked = asked

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        # ``key in config.keys()`` is how some parts ask.
        return self

    def __copy__(self) -> _Listening:
        return _Listening(self, self._asked)
