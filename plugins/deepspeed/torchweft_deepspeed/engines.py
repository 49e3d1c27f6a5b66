"""All models that were set up, and a backward pass that may lead to several of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft.errors import Misuse
from torchweft_deepspeed.engine import Engine
from torchweft_deepspeed.graph import reached

__all__ = ["Engines"]


class Engines:
    """The engines of a process, each as long as its model lives."""

    def __init__(self) -> None:
        self._engines: weakref.WeakKeyDictionary[Engine, None] = weakref.WeakKeyDictionary()
        # An engine has its optimizer, so that nothing here may hold it.
        self._of_optimizer: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Engine]] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, engine: Engine) -> None:
        """Know one, also by its optimizer."""
        self._engines[engine] = None
        if engine.optimizer is not None:
            self._of_optimizer[engine.optimizer] = weakref.ref(engine)

    def all(self) -> list[Engine]:
        """In the order in which they were set up."""
        return list(self._engines)

    def get(self, module: nn.Module) -> Engine | None:
        """That of a model as ``setup`` returned it; None where it needs none."""
        return module if isinstance(module, Engine) else None

    def of(self, optimizer: Optimizer) -> Engine:
        """That of the user's optimizer. Raises ``Misuse`` where its model is gone."""
        held = self._of_optimizer.get(optimizer)
        engine = None if held is None else held()
        if engine is None:
            raise Misuse(
                f"the model of this {type(optimizer).__name__} is gone, and DeepSpeed's engine "
                "with it; keep what fabric.setup() returned"
            )
        return engine

    def backward(self, loss: Tensor, module: nn.Module | None, retain_graph: bool) -> None:
        """By one engine, beside which all others that gradients come to do their part."""
        engine = self._engine_of(loss, module)
        everyone = self.all()
        for each in everyone:
            each.expecting, each.touched = True, False
        scale = engine.loss_scale
        try:
            with _alongside([each for each in everyone if each is not engine]):
                engine.backward(loss, retain_graph)
        finally:
            for each in everyone:
                each.expecting = False
        engine.touched = True
        for each in everyone:
            if each.touched:
                each.passed(scale)

    def _engine_of(self, loss: Tensor, module: nn.Module | None) -> Engine:
        if module is not None:
            engine = self.get(module)
            if engine is None or engine.optimizer is None:
                raise Misuse(
                    "fabric.backward(loss, model=model) was given a model without an optimizer, "
                    "which DeepSpeed does not train; call fabric.setup(model, optimizer)"
                )
            return engine
        training = [each for each in self.all() if each.optimizer is not None]
        if len(training) == 1:
            return training[0]
        owners = {id(p): each for each in training for p in each.module.parameters()}
        found = reached(loss, owners)
        # What is scaled, and by how much, is the matter of one; otherwise all are alike.
        if found and len({each.loss_scale for each in found}) == 1:
            return found[0]
        what = f"{len(found)} of the models that were set up" if found else "no model"
        raise Misuse(
            f"fabric.backward(loss) leads to {what}, so that DeepSpeed cannot tell whose engine "
            "it is for; write fabric.backward(loss, model=model)"
        )


@contextmanager
def _alongside(others: Sequence[Engine]) -> Iterator[None]:
    """Let gradients come to models whose engine was not asked for the backward pass."""
    for each in others:
        # DeepSpeed refuses at stage 0 what it does for itself elsewhere, and where it scales
        # losses it wants to have been asked.
        each.live._manual_backward_expected = True
        each.live._running_engine_backward = each.stage == 0
    try:
        yield
    finally:
        for each in others:
            each.live._manual_backward_expected = False
            each.live._running_engine_backward = False
    for each in others:
        if each.touched and each.stage == 0:
            each.live._backward_epilogue()
