"""Importing without searching for garbage, which takes a third of the time of large imports."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator

__all__ = ["collector_off", "served"]


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


def served(modules: Iterable[str]) -> list[str]:
    """What a fork server imports once: these modules, and what every rank needs."""
    here = __name__.rpartition(".")[0]
    common = ("torch", "torchweft.fabric")
    return [f"{here}.served_first", *common, *modules, f"{here}.served_last"]
