from __future__ import annotations

import functools
import pickle
import threading
import types
from typing import Any

import pytest
from tests.core.fresh_python import python

from torchweft import Fabric
from torchweft.api import Precision
from torchweft.builtin.launchers.handing import pack_call
from torchweft.errors import Misuse


def train(fabric: Any, *args: Any) -> None:
    """Can be imported."""


def test_a_call_is_handed_over() -> None:
    function, arguments = pickle.loads(pack_call(train, (1, {"a": [2]})))
    assert function is train
    assert arguments == (1, {"a": [2]})


def test_a_partial_and_a_method() -> None:
    function, _ = pickle.loads(pack_call(functools.partial(train, rate=1), ()))
    assert function.keywords == {"rate": 1}
    function, _ = pickle.loads(pack_call([1, 2].index, ()))
    assert function(2) == 1


class Unpicklable:
    def __repr__(self) -> str:
        return "<a lock, of a length that nobody wants to read to its very end in a message>"

    def __reduce__(self) -> Any:
        raise TypeError("holds a lock")


@pytest.mark.parametrize(
    ("function", "arguments", "culprit"),
    [
        (lambda fabric: None, (), "the function"),
        (train, (1, Unpicklable()), "the argument <a lock, of a length"),
    ],
)
def test_what_cannot_be_handed_over_is_named(
    function: Any, arguments: tuple[Any, ...], culprit: str
) -> None:
    with pytest.raises(Misuse) as caught:
        pack_call(function, arguments)
    told = str(caught.value)
    assert told.startswith(f"fresh processes cannot be given {culprit}")
    assert told.endswith(
        "define it at the top level of a module, or use launcher='fork', which pickles nothing"
    )


def test_it_is_told_why_nothing_was_forked() -> None:
    with pytest.raises(Misuse) as caught:
        pack_call(lambda fabric: None, (), not_forked="this process has other threads (watcher)")
    assert str(caught.value).endswith(
        "or call fabric.launch(function) before this: this process has other threads (watcher), "
        "so nothing can be forked"
    )


class Locked(Precision):
    name = "locked"

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_the_part_of_a_fabric_is_named() -> None:
    fabric = Fabric(accelerator="cpu", precision=Locked())
    with pytest.raises(Misuse, match=r"cannot be given the precision Locked, which cannot be pick"):
        pack_call(train, (fabric,))
    fabric = Fabric(accelerator="cpu", callbacks=[Unpicklable()])
    with pytest.raises(Misuse, match=r"cannot be given the callback Unpicklable, which"):
        pack_call(train, (fabric,))
    module = types.ModuleType("made_here")
    fabric = Fabric(accelerator="cpu", plugins=[module])
    with pytest.raises(Misuse, match=r"cannot be given the module 'made_here' of plugins="):
        pack_call(train, (fabric,))


ASK = """
from torchweft.builtin.launchers.handing import pack_call
from torchweft.errors import Misuse
import os
class Setting:
    pass
def train(fabric, setting=None):
    pass
for call in [(train, ()), (print, (Setting(),)), (print, ([Setting],)), (print, (os.path,))]:
    try:
        pack_call(*call)
        print("handed over")
    except Misuse as error:
        print(error)
"""


def test_a_program_that_cannot_be_imported() -> None:
    done = python(ASK)
    told = done.stdout.splitlines()
    words = (
        "which was defined in a program that they cannot import (an interactive session, python "
        "-c, or standard input); define it in a module, or use launcher='fork'"
    )
    assert told[0].startswith(f"fresh processes cannot be given 'train', {words}"), done.stderr
    assert told[1].startswith(f"fresh processes cannot be given 'Setting', {words}")
    assert told[2].startswith(f"fresh processes cannot be given 'Setting', {words}")
    assert told[3].startswith("fresh processes cannot be given the argument <module")


def test_a_program_that_can_be_imported() -> None:
    code = "import sys\n__file__ = 'a script'\n" + ASK.replace("(print, (os.path,))", "")
    assert python(code).stdout == "handed over\n" * 3
