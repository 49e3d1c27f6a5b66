"""Fully sharded data parallel on XLA devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.api import Place, Prepared, map_leaves
from torchweft_xla.spreading import Spread
from torchweft_xla.strategy import XLAStrategy

__all__ = ["XLAFSDPStrategy"]


class XLAFSDPStrategy(XLAStrategy):
    """Parameters, gradients and optimizer state divided between the devices, and batches too.

    ZeRO stage 3: Rajbhandari et al., 2020 (arXiv:1910.02054); by GSPMD: Xu et al., 2021
    (arXiv:2105.04663). Each parameter is divided along its longest dimension that divides evenly,
    and where there is none, each device has a copy. XLA gathers a parameter where it is computed
    with. ``model.state_dict()`` is whole on one host.

    Args:
        min_size: parameters of fewer elements are copied, not divided.
        timeout: seconds that a collective between hosts may take before the run is given up.
    """

    name = "xla_fsdp"

    def __init__(self, *, min_size: int = 0, timeout: float = 1800.0) -> None:
        super().__init__(timeout=timeout)
        self._min_size = min_size

    def start(self, place: Place) -> None:
        """As ``XLAStrategy``; on several hosts a process holds a part of each parameter."""
        super().start(place)
        self.splits_parameters = place.rank.world_size > 1
        self.splits_optimizer = self.splits_parameters

    # -- setup -----------------------------------------------------------------------------------

    def setup(self, module: nn.Module, optimizers: Sequence[Optimizer], scheduler: Any) -> Prepared:
        """Divide the parameters, and have what is computed with them stay divided by batch."""
        spread = self._spread
        if spread is not None:
            for parameter in module.parameters():
                self._divide(spread, parameter)
            for part in module.modules():
                if next(part.parameters(recurse=False), None) is not None:
                    part.register_forward_hook(_BatchStaysDivided(spread))
        return super().setup(module, optimizers, scheduler)

    def _divide(self, spread: Spread, parameter: nn.Parameter) -> None:
        dim = self._dim(spread, parameter)
        spread.divide(parameter, dim)
        if parameter.requires_grad:
            hook = _GradientDivided(spread, dim)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _dim(self, spread: Spread, parameter: Tensor) -> int | None:
        small = parameter.numel() < self._min_size
        return None if small else spread.longest(parameter)


class _BatchStaysDivided:
    """A forward hook: otherwise XLA may divide what a layer computes by its features instead."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return map_leaves(outputs, self._mark)

    def _mark(self, leaf: Any) -> Any:
        spread = self._spread
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] % spread.devices == 0:
            return spread.divided(leaf, 0)
        return leaf


class _GradientDivided:
    """A hook of a parameter: its gradient lies as it does."""

    def __init__(self, spread: Spread, dim: int | None) -> None:
        self._spread, self._dim = spread, dim

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._spread.divide(parameter.grad, self._dim)
