"""What surrounds the construction of modules: no numbers drawn, another default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["SkipInit", "default_dtype"]


class SkipInit(TorchFunctionMode):
    """Leaves parameters as they were allocated, where ``torch.nn.init`` would draw numbers.

    Constants are cheap, and some of its functions for them cannot be intercepted.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Either one of torch.nn.init's functions, or what the others of them come down to.
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _DRAWS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            # A buffer may be in no checkpoint and keeps what the module puts into it.
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)


_DRAWS = frozenset({Tensor.uniform_, Tensor.normal_})


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default floating-point dtype, for the time of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
