"""How examples are drawn, where extensions are compiled, and what is left out of a short run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.long import LONG

# A busy machine is no failure: nothing here is judged by the time that it takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Extensions of one environment are no other's: torch would compile them again and again in turn.
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "extensions"))


#: Modules that take long come first, so that all workers end at about the same time.
FIRST = ("slurm", "ray", "deepspeed", "conformance", "endtoend", "mpi", "cuda", "xla")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them into order, and leave out what runs at full length alone."""
    turns = {f"tests/{folder}": turn for turn, folder in enumerate(FIRST)}
    items.sort(key=lambda item: turns.get("/".join(item.nodeid.split("/")[:2]), len(turns)))
    if os.environ.get("TORCHWEFT_SOAK") == "1":
        return
    long = tuple(f"tests/{prefix}" for prefix in LONG)
    for item in items:
        if item.nodeid.startswith(long):
            item.add_marker(pytest.mark.skip(reason="runs at full length: TORCHWEFT_SOAK=1"))


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """A process group or a folder that a test leaves behind changes what the next ones find."""
    here = os.getcwd()
    yield
    there = os.getcwd()
    os.chdir(here)
    torch = sys.modules.get("torch")
    group = torch is not None and torch.distributed.is_initialized()
    if torch is not None and group:
        torch.distributed.destroy_process_group()
    assert not group, "a process group is left behind"
    assert there == here
