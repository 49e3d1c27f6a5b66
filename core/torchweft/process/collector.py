"""Importing without searching for garbage, which takes a third of the time of large imports."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterable, Iterator

__all__ = ["collector_off", "served", "unwarned"]


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No collection meanwhile, and none afterwards for what was made meanwhile.

    That is promoted to the oldest generation without being looked at: a collection would also
    write to every object, and so copy the memory that forked ranks share. What the caller froze
    stays as it is.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Warn of nothing meanwhile; filters that what is imported adds stay.

    Nobody asked yet for what is imported ahead, and where warnings are errors, one of a library
    that a rank may never use would end the process.
    """
    silent = ("ignore", None, Warning, None, 0)
    asked = silent in warnings.filters
    warnings.simplefilter("ignore")
    try:
        yield
    finally:
        if not asked:
            warnings.filters.remove(silent)  # type: ignore[attr-defined]


def served(modules: Iterable[str]) -> list[str]:
    """What a fork server imports once: these modules, and what every rank needs."""
    here = __name__.rpartition(".")[0]
    common = ("torch", "torchweft.fabric")
    return [f"{here}.served_first", *common, *modules, f"{here}.served_last"]
