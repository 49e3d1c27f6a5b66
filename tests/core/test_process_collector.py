"""Importing without the garbage collector, here and in a fork server."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from tests.core.fresh_python import python

from torchweft.process import collector_off, served


class _Node:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_meanwhile_and_everything_can_be_afterwards() -> None:
    with collector_off():
        assert not gc.isenabled()
        node = weakref.ref(_Node())
        made = {"a list": [1]}
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    # The oldest generation alone is looked at last.
    gc.collect(1)
    assert node() is not None
    assert any(it is made for it in gc.get_objects(generation=2))
    gc.collect()
    assert node() is None


def test_an_error_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), collector_off():
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_the_user_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with collector_off():
            assert gc.isenabled()
        # Another thread of the test runner may let go of a few meanwhile.
        assert 0 <= before - gc.get_freeze_count() < 1000
    finally:
        gc.unfreeze()


def test_a_fork_server_freezes_what_it_imported() -> None:
    code = f"""
import gc, importlib, sys
for name in {served(["json.tool"])!r}:
    importlib.import_module(name)
    if name.endswith("first"):
        assert not gc.isenabled()
assert gc.isenabled() and "json.tool" in sys.modules and "torchweft.fabric" in sys.modules
print(gc.get_freeze_count() > 100_000)
"""
    assert python(code).stdout.split() == ["True"]


def test_an_import_of_a_fork_server_warns_nobody(tmp_path: Path) -> None:
    """Nobody asked for it yet; errors of it would end the server."""
    (tmp_path / "warner.py").write_text("import warnings; warnings.warn('old')\n")
    code = f"""
import importlib, sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
warnings.simplefilter("error")
for name in {served(["warner"])!r}:
    importlib.import_module(name)
assert "warner" in sys.modules
try:
    warnings.warn("mine")
except UserWarning:
    print("as before")
"""
    assert python(code).stdout.split() == ["as", "before"]
