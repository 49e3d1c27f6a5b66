"""What is wrong with the place where nodes meet is told before any process starts."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.endtoend.commands import SCRIPTS

RUN = [sys.executable, "-m", "torchweft", "run", "--devices", "1"]
SCRIPT = SCRIPTS / "flags.py"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use(taken: int, run) -> None:
    for more in (
        ["--main-port", str(taken)],
        ["--num-nodes", "2", "--main-address", "127.0.0.1", "--main-port", str(taken)],
    ):
        done = run(*RUN, *more, SCRIPT, "{}")
        assert done.status == 1
        assert done.err == (
            f"error: cannot listen on 127.0.0.1:{taken}: Address already in use; choose another "
            "--main-port, or leave it out on one node and a free one is taken\n"
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--main-address", "no-such-host.invalid"],
            "--main-address no-such-host.invalid",
        ),
        (
            ["--rdzv-backend", "c10d", "--rdzv-endpoint", "no-such-host.invalid:1"],
            "--rdzv-endpoint no-such-host.invalid:1",
        ),
    ],
)
def test_an_address_that_does_not_resolve(more: list[str], said: str, run) -> None:
    done = run(*RUN, "--num-nodes", "2", *more, SCRIPT, "{}")
    assert done.status == 1
    assert f"error: {said}: 'no-such-host.invalid' does not resolve here (" in done.err
    assert "give an address by which this node reaches it" in done.err


def test_a_node_0_that_does_not_answer(run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = ["--num-nodes", "2", "--main-address", "127.0.0.1", "--main-port", str(port)]
    done = run(*RUN, *place, "--node-rank", "1", "--join-timeout", "1", SCRIPT, "{}")
    assert done.status == 1
    assert done.err == (
        f"error: node 1 of 2 cannot reach node 0 at 127.0.0.1:{port} (--main-address, --main-port) "
        "after 1 s: Connection refused; start the command with --node-rank 0 there, see that no "
        "firewall is between, or raise --join-timeout\n"
    )


def test_an_address_that_is_another_computers(run) -> None:
    """192.0.2.0/24 is for documentation: nobody has it."""
    place = ["--num-nodes", "2", "--main-address", "192.0.2.77", "--node-rank", "0"]
    done = run(*RUN, *place, SCRIPT, "{}")
    assert done.status in (1, 2)
    assert re.fullmatch(
        f"error: --main-address 192.0.2.77 is no address of this node, {socket.gethostname()}, "
        r"which is node 0, and does not lead to it: .+; give an address of the node that is "
        "started with --node-rank 0\n",
        done.err,
    )


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "http"]
)
def test_another_program_at_the_port_of_node_0(answer: bytes, run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer, args=(listener, answer), daemon=True).start()
        port = str(listener.getsockname()[1])
        place = ["--num-nodes", "2", "--main-address", "127.0.0.1", "--main-port", port]
        done = run(*RUN, *place, "--node-rank", "1", "--join-timeout", "2", SCRIPT, "{}")
    assert done.status == 1
    assert f"error: node 1 of 2 cannot reach node 0 at 127.0.0.1:{port} (--main-" in done.err
    assert "after 2 s: another program has that port" in done.err
    assert "Traceback" not in done.err


def _answer(listener: socket.socket, answer: bytes) -> None:
    held = []
    with contextlib.suppress(OSError):
        while True:
            peer, _ = listener.accept()
            held.append(peer)  # silent, and not closed
            if answer:
                peer.sendall(answer)
                peer.close()


def test_two_nodes_with_one_number(start, run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = ["--num-nodes", "3", "--main-address", "127.0.0.1", "--main-port", str(port)]
    more = [*place, "--join-timeout", "12", SCRIPT, "{}"]
    nodes = [start(*RUN, "--node-rank", number, *more) for number in ("0", "1", "1")]
    errors = [node.finish().err for node in nodes]
    assert "1 of 3 nodes did not come within 12 s (--join-timeout): --node-rank 2" in errors[0]
    doubled = "another node has come as --node-rank 1 already; give each of the 3 nodes a number"
    assert [doubled in error for error in sorted(errors[1:])].count(True) == 1


@pytest.mark.parametrize("given", ["a", "a=1,b", "=1"])
def test_settings_of_the_backend(given: str, run) -> None:
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1"]
    done = run(*RUN, *endpoint, "--rdzv-conf", given, SCRIPT, "{}")
    assert done.status == 2
    assert f"--rdzv-conf takes 'key=value,key=value'; it was given '{given}'" in done.err
