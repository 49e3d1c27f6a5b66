"""Callbacks: who is called, with what, and what that costs."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest

from torchweft.callbacks import Callbacks
from torchweft.errors import InvalidRequest


class Notes:
    """Notes what its methods are told."""

    on_text = "no method"
    on_none = None

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_all(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append((args, kwargs))

    def on_some(self, first: Any, *, loss: float = 0.0) -> None:
        self.seen.append((first, loss))

    def on_nothing(self) -> None:
        self.seen.append("nothing")

    def on_positional(self, first: Any, /, second: Any = None) -> None:
        self.seen.append((first, second))

    @staticmethod
    def on_static(box: list[Any]) -> None:
        box.append("static")


def test_keyword_arguments_are_those_that_the_method_names() -> None:
    notes = Notes()
    callbacks = Callbacks([notes])
    callbacks.call("on_all", 1, loss=2, epoch=3)
    callbacks.call("on_some", 1, loss=2, epoch=3)
    callbacks.call("on_some", first=4, epoch=3)
    callbacks.call("on_nothing", loss=2)
    callbacks.call("on_positional", 1, first=2, second=3)
    box: list[Any] = []
    callbacks.call("on_static", box=box, loss=1)
    assert notes.seen == [((1,), {"loss": 2, "epoch": 3}), (1, 2), (4, 0.0), "nothing", (1, 3)]
    assert box == ["static"]


def test_positional_arguments_are_passed_as_they_are() -> None:
    with pytest.raises(TypeError, match=r"on_nothing\(\) takes 1 positional argument but 2 were"):
        Callbacks([Notes()]).call("on_nothing", 1)


def test_a_keyword_may_have_the_name_of_the_parameter_of_call() -> None:
    notes = Notes()
    Callbacks([notes]).call("on_all", hook=1, args=2)
    assert notes.seen == [((), {"hook": 1, "args": 2})]


def test_every_callback_is_called_in_order_and_those_without_the_method_are_not() -> None:
    calls: list[int] = []

    class Number:
        def __init__(self, number: int) -> None:
            self.on_step = lambda: calls.append(number)

    Callbacks([Number(1), object(), Number(2), Notes(), Number(3)]).call("on_step")
    assert calls == [1, 2, 3]


def test_an_attribute_that_is_no_method_is_an_error() -> None:
    callbacks = Callbacks([Notes()])
    callbacks.call("on_none")
    words = r"^fabric.call\('on_text'\): attribute 'on_text' of Notes is a str, not a method$"
    for ask in (callbacks.call, callbacks.listens):
        with pytest.raises(InvalidRequest, match=words):
            ask("on_text")


def test_who_listens() -> None:
    assert Callbacks([object(), Notes()]).listens("on_all")
    assert not Callbacks([object(), Notes()]).listens("on_other")
    assert not Callbacks([Notes()]).listens("on_none")
    assert not Callbacks().listens("on_all")


def test_a_wrong_attribute_behind_a_right_one_is_found() -> None:
    class Right:
        def on_text(self) -> None: ...

    with pytest.raises(InvalidRequest, match="attribute 'on_text' of Notes is a str"):
        Callbacks([Right(), Notes()]).listens("on_text")


def test_a_signature_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    signature = inspect.signature

    def counting(function: Any) -> inspect.Signature:
        looked.append(function)
        return signature(function)

    monkeypatch.setattr(inspect, "signature", counting)
    callbacks = Callbacks([Notes(), Notes()])
    for step in range(5):
        callbacks.call("on_some", step, loss=1.0, epoch=2)
        callbacks.call("on_all", step, loss=1.0)
    assert len(looked) == 4


def test_a_method_that_is_replaced_is_called_as_the_new_one_wants() -> None:
    notes = Notes()
    callbacks = Callbacks([notes])
    callbacks.call("on_nothing", loss=1)
    notes.on_nothing = lambda loss: notes.seen.append(loss)  # type: ignore[method-assign, misc]
    callbacks.call("on_nothing", loss=1)
    assert notes.seen == ["nothing", 1]


def test_a_callable_without_a_signature_is_passed_everything() -> None:
    class Made:
        on_step = dict

    Callbacks([Made()]).call("on_step", loss=1)


def test_the_list_that_was_given_is_left_alone() -> None:
    given = [Notes()]
    callbacks = Callbacks(given)
    given.append(Notes())
    assert len(callbacks) == 1
    assert list(callbacks) == given[:1]


def test_callbacks_travel_to_another_process() -> None:
    callbacks = Callbacks([Notes()])
    callbacks.call("on_some", 1, loss=2, epoch=3)
    copied = pickle.loads(pickle.dumps(callbacks))
    copied.call("on_some", 4, loss=5, epoch=3)
    assert [notes.seen for notes in copied] == [[(1, 2), (4, 5)]]
    assert [notes.seen for notes in callbacks] == [[(1, 2)]]
