"""What the commands of several nodes tell each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from torchweft.cli import tidings
from torchweft.cli.tidings import Tidings

Begin = Callable[..., tuple[Tidings, threading.Event]]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Make a node's end, and what is set where its part of the run has to end."""
    monkeypatch.setattr(tidings, "_TICK", 0.05)
    monkeypatch.setattr(tidings, "_SILENCE", 0.6)
    monkeypatch.setattr(tidings, "_MOMENT", 0.1)
    monkeypatch.setattr(tidings, "_PATIENCE", 0.5)
    monkeypatch.setattr(tidings, "_HEARD", 0.5)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made: list[Tidings] = []

    def of(node: object, nodes: int = 3) -> tuple[Tidings, threading.Event]:
        client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        store = PrefixStore("nodes", client)
        ended = threading.Event()
        made.append(Tidings(lambda: store, str(node), ended.set, serves=node == 0, nodes=nodes))
        return made[-1], ended

    yield of
    for one in reversed(made):
        one.close()


def test_a_failure_ends_all_nodes(begin: Begin) -> None:
    nodes = [begin(node) for node in range(3)]
    nodes[2][0].fail("rank 5 of 6 failed: ValueError: no")
    for one, ended in nodes[:2]:
        assert ended.wait(5)
        assert one.news is not None
        assert (one.news.node, one.news.text) == ("2", "rank 5 of 6 failed: ValueError: no")
    assert not nodes[2][1].is_set()
    assert nodes[2][0].cause() is None


def test_a_node_that_says_nothing_any_more(begin: Begin) -> None:
    first, ended = begin(0)
    lives, still = begin(1)
    silent, _ = begin(2)
    time.sleep(0.3)
    silent._over.set()  # as if it had been killed
    assert ended.wait(5)
    assert str(first.news) == (
        "node 2 of 3 has not been heard of for 0.6 s; see whether its computer, the network or its "
        "command was ended"
    )
    first.fail(str(first.news))
    assert still.wait(5)
    assert lives.news is not None


def test_a_node_that_is_done_is_not_missed(begin: Begin) -> None:
    _, ended = begin(0)
    done, _ = begin(1)
    begin(2)
    time.sleep(0.2)
    done.close()
    assert not ended.wait(1.2)


def test_nodes_that_come_and_go(begin: Begin) -> None:
    first, ended = begin("a:1", 0)
    gone, _ = begin("b:2", 0)
    time.sleep(0.2)
    gone._over.set()  # as if it had been killed
    assert not ended.wait(1.2)
    third, _ = begin("c:3", 0)
    time.sleep(0.2)
    third.fail("rank 0 of 2 failed: ValueError: no")
    assert ended.wait(5)
    assert str(first.news) == "rank 0 of 2 failed: ValueError: no\nin full in the output of c:3"


def test_without_a_store_nothing_is_told() -> None:
    alone = Tidings(None, "0", pytest.fail, serves=True)
    alone.fail("no")
    assert alone.cause() is None
    alone.close()
