"""How the models of the conformance kit are divided between processes."""

from __future__ import annotations

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

__all__ = ["divide"]


def divide(model, mesh):
    """A plan by the names of the layers that a model has; each kit model has other ones."""
    layers = {name for name, _ in model.named_children()}
    if layers == {"first", "second"}:
        return {"first": ColwiseParallel(), "second": RowwiseParallel()}
    whole = ColwiseParallel(output_layouts=Replicate())
    split = RowwiseParallel(input_layouts=Replicate())
    # Both ends of a shared weight are left whole.
    return {name: whole if name in ("first", "again") else split for name in layers & DIVIDED}


DIVIDED = {"first", "again", "second", "out"}
