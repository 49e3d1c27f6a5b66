"""What a rank returns, on its way to the process that called ``fabric.launch(function)``."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchweft.errors import TorchweftError

__all__ = ["pack_result"]


class _OnCpu(pickle.Pickler):
    """Pickles tensors as tensors of their own on the CPU, wherever they hide."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return NotImplemented
        if isinstance(value, Parameter) or (
            type(value) is not Tensor and value.device.type == "cpu"
        ):
            return NotImplemented  # reduces to a plain tensor, which comes here again
        return _alone(value).__reduce_ex__(4)  # type: ignore[no-untyped-call]


def _alone(tensor: Tensor) -> Tensor:
    """The values alone: on the CPU, without the graph, without the rest of a storage."""
    leaf = tensor.requires_grad and tensor.is_leaf
    alone = tensor.detach().cpu()
    if alone.layout == torch.strided and not alone.is_quantized:
        held = alone.untyped_storage().nbytes()
        if held > alone.numel() * alone.element_size():
            # A view takes everything along that it is a view of.
            alone = alone.clone()
    return alone.requires_grad_() if leaf else alone


def pack_result(result: Any, rank: int = 0) -> bytes:
    """What ``rank`` returned from a function, pickled, with its tensors on the CPU.

    Raises ``TorchweftError``, which names the type, when it cannot be pickled.
    """
    buffer = io.BytesIO()
    try:
        _OnCpu(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    except Exception as error:
        kind = f"{type(result).__module__}.{type(result).__qualname__}"
        raise TorchweftError(
            f"the function given to fabric.launch() returned a {kind} in rank {rank}, which cannot "
            f"be pickled and so not be brought back: {error}; return tensors, numbers or a "
            "state_dict() instead"
        ) from error
    return buffer.getvalue()
