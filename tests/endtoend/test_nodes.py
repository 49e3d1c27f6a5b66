"""What is wrong with the place where nodes meet is told before any process starts."""

from __future__ import annotations

import socket
import sys
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
