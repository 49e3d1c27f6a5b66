"""32-bit on XLA devices."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from torchweft.api import Precision

__all__ = ["Full"]


class Full(Precision):
    """32-bit throughout.

    A TPU multiplies matrices of 32-bit numbers in bfloat16 unless it is told otherwise. Here it is
    told otherwise, which takes six passes in place of one.

    Args:
        matmul: ``"highest"``: products as exact as 32-bit allows; ``"high"``: three passes in
            bfloat16; ``"default"``: one.
    """

    def __init__(self, *, matmul: Literal["highest", "high", "default"] = "highest") -> None:
        self._matmul = matmul

    def start(self, device: torch.device) -> None:
        """Settle it for every graph that is compiled from now on."""
        super().start(device)
        from torch_xla.backends import get_mat_mul_precision, set_mat_mul_precision

        # It warns of being called at all.
        log = logging.getLogger("torch_xla.backends")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            if get_mat_mul_precision() != self._matmul:
                set_mat_mul_precision(self._matmul)
        finally:
            log.setLevel(level)
