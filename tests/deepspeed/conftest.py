"""What is here needs torchweft-deepspeed, which is installed where it is tested, and a compiler."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent

#: Where nothing is asked of a ``Fabric`` with strategy ``deepspeed`` but to be refused.
PLAIN = {"test_locks", "test_probe"}

if find_spec("torchweft_deepspeed") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("torchweft_deepspeed") is None:
        return
    from torchweft_deepspeed.probe import deepspeed

    found = deepspeed()
    if found.ok:
        return
    skip = pytest.mark.skip(reason=f"{found.reason}; {found.hint}")
    for item in items:
        if item.path.parent == HERE and item.path.stem not in PLAIN:
            item.add_marker(skip)
