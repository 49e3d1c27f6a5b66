"""Choosing modules of a model: by names of classes, by classes, by a function, or by size."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchweft.api.choosing import check_choice, chosen_by

__all__ = ["checked", "choose", "unshared"]

#: Parameters that ``"auto"`` gathers at once at most, whatever the model's size.
_MOST = 1_000_000_000


def checked(option: str, value: Any) -> Any:
    """The value of an option, classes as a tuple. Raises ``InvalidRequest`` for what is none."""
    return check_choice("fsdp", option, value)


def choose(module: nn.Module, option: str, value: Any) -> list[nn.Module]:
    """The modules inside of ``module`` that a checked value chooses, inner ones first.

    Raises ``InvalidRequest`` where it chooses none.
    """
    if option == "policy" and value == "auto":
        by_size = {id(each) for each in _by_size(module)}
        return [each for each in reversed([*module.modules()]) if id(each) in by_size]
    return chosen_by(module, "fsdp", option, value)


def _by_size(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that hold no more than a quarter of all parameters.

    A larger one without modules inside is taken as it is; what holds less than a thousandth is
    left to be gathered with what surrounds it.
    """
    total = _count(module)
    most, least = min(total / 4, _MOST), total / 1000
    chosen: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        for child in parent.children():
            size = _count(child)
            if size < least:
                continue
            # Without a forward pass of its own there is nothing to gather a module for.
            runs = type(child).forward is not nn.Module.forward
            # Of attention torch uses the layer inside without calling it.
            whole = isinstance(child, nn.MultiheadAttention) or not any(child.children())
            if runs and (size <= most or whole):
                chosen.append(child)
            else:
                visit(child)

    visit(module)
    return chosen


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def unshared(parts: list[nn.Module], module: nn.Module) -> list[nn.Module]:
    """Those of ``parts`` none of whose parameters is one of a module outside of it too.

    A parameter cannot be in two groups; one with a second name elsewhere is gathered with the
    whole, for both.
    """
    return [part for part in parts if not _shares(part, module)]


def _shares(part: nn.Module, module: nn.Module) -> bool:
    inside = set(part.modules())
    held = {id(parameter) for parameter in part.parameters()}
    return any(
        id(parameter) in held
        for each in module.modules()
        if each not in inside
        for parameter in each.parameters(recurse=False)
    )
