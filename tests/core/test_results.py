from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import nn

from torchweft.builtin.launchers.results import Results, send_result
from torchweft.errors import TorchweftError


@pytest.fixture
def pipe():  # type: ignore[no-untyped-def]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        yield Results(receiver), sender


def brought(result: Any) -> Any:
    """What arrives of it, as from another process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        results = Results(receiver)
        thread = threading.Thread(target=send_result, args=(result, sender))
        thread.start()
        while thread.is_alive():
            results.idle(0.01)
        return results.take()


def sent(result: Any) -> int:
    """Bytes that it takes."""
    reader, writer = os.pipe()
    with Connection(reader) as receiver, Connection(writer) as sender:
        counted = 0

        def count() -> None:
            nonlocal counted
            while chunk := os.read(receiver.fileno(), 1 << 20):
                counted += len(chunk)

        thread = threading.Thread(target=count)
        thread.start()
        send_result(result, sender)
        thread.join()
    return counted


@pytest.mark.parametrize("result", [None, 0, "text", {"a": [1, (2.5, b"x")]}, b"x" * 5_000_000])
def test_plain_values(result: Any) -> None:
    assert brought(result) == result


TENSORS = {
    "plain": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "a scalar": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "complex": torch.ones(3, dtype=torch.complex64),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "a view": torch.arange(1000.0)[10:13],
    "expanded": torch.ones(1, 3).expand(5, 3),
    "sparse": torch.eye(3).to_sparse(),
    "boolean": torch.tensor([True, False]),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_tensors(name: str) -> None:
    tensor = TENSORS[name]
    back = brought({"nested": [tensor]})["nested"][0]
    assert back.dtype == tensor.dtype
    assert back.layout == tensor.layout
    assert torch.equal(back.to_dense(), tensor.to_dense())


def test_a_tensor_without_values() -> None:
    back = brought(torch.empty(3, device="meta"))
    assert (back.shape, back.device.type) == ((3,), "meta")


def test_the_graph_stays_where_it_was() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    back = brought({"weight": weight, "loss": loss, "hidden": weight * 2})
    assert back["weight"].requires_grad
    assert back["weight"].is_leaf
    assert back["loss"].item() == 6
    assert not back["loss"].requires_grad
    assert torch.equal(back["hidden"], torch.full((2,), 2.0))


def test_a_small_view_does_not_bring_what_it_is_a_view_of() -> None:
    large = torch.zeros(1_000_000)
    assert sent(large[:3]) < 5_000
    assert sent([large[:3], nn.Parameter(large[3:6]), large[7]]) < 15_000
    assert sent(large) < 4_010_000


def test_views_of_one_storage_are_sent_once_each() -> None:
    """As buckets of gradients are; each would otherwise bring the whole."""
    large = torch.zeros(100_000)
    assert sent(list(large.split(1000))) < 600_000


def test_a_module() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    back = brought(module)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in back.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_a_result_of_many_megabytes() -> None:
    large = torch.arange(25_000_000, dtype=torch.float32)
    assert torch.equal(brought({"weight": large})["weight"], large)


class Local:
    def __reduce__(self) -> Any:
        raise RuntimeError("not to be copied")


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        ((value for value in ()), "builtins.generator"),
        (lambda: None, "builtins.function"),
        (Local(), "tests.core.test_results.Local"),
        ({"inside": Local()}, "builtins.dict"),
        (threading.Lock(), "_thread.lock"),
    ],
)
def test_what_cannot_be_pickled_is_named(result: Any, kind: str, pipe) -> None:
    with pytest.raises(
        TorchweftError,
        match=rf"^the function given to fabric\.launch\(\) returned a {kind} in rank 0, which "
        r"cannot be pickled and so not be brought back: .*; return tensors, numbers or a "
        r"state_dict\(\) instead$",
    ):
        send_result(result, pipe[1])


def test_nothing_was_sent(pipe) -> None:  # type: ignore[no-untyped-def]
    results, sender = pipe
    sender.close()
    results.idle(0.01)
    results.idle(0.01)
    assert results.take() is None


def test_a_sender_that_died_in_the_middle(pipe) -> None:  # type: ignore[no-untyped-def]
    """Somebody else, such as a process that it left behind, may hold the pipe open for ever."""
    results, sender = pipe
    os.write(sender.fileno(), (1 << 20).to_bytes(8, "big") + b"x" * 5000)
    results.idle(0.01)
    assert results.take() is None


@pytest.mark.parametrize("sent", [b"", b"\0\0\0"])
def test_less_than_a_length(sent: bytes, pipe) -> None:  # type: ignore[no-untyped-def]
    results, sender = pipe
    os.write(sender.fileno(), sent)
    assert results.take() is None


def test_waiting_ends_when_nothing_comes(pipe) -> None:  # type: ignore[no-untyped-def]
    results, _ = pipe
    results.idle(0.0)
    results.idle(0.01)
    assert results.take() is None
