"""What is wrong with the place where nodes meet is told before any process starts."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import PrefixStore, TCPStore

from tests.endtoend.commands import SCRIPTS, Command
from tests.endtoend.test_elastic import until

RUN = [sys.executable, "-m", "torchweft", "run", "--devices", "1"]
SCRIPT = SCRIPTS / "flags.py"


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use(taken: int, run) -> None:
    port = ["--main-port", str(taken)]
    for more, way_out in (
        (port, ", or leave it out and a free one is taken"),
        (["--num-nodes", "2", "--main-address", "127.0.0.1", *port], ", the same on every node"),
    ):
        done = run(*RUN, *more, SCRIPT, "{}")
        assert done.status == 1
        assert done.err == (
            f"error: cannot listen on 127.0.0.1:{taken}: Address already in use; choose another "
            f"--main-port{way_out}\n"
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
    doubled = "another node has come as --node-rank 1; give each of the 3 nodes a number"
    assert [doubled in error for error in sorted(errors[1:])].count(True) == 1


def test_a_node_that_comes_again(start, run) -> None:
    """One that ended while others were awaited takes no part, and nobody's number."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    place = ["--num-nodes", "3", "--main-address", "127.0.0.1", "--main-port", str(port)]
    more = [*place, "--join-timeout", "60", SCRIPT, "{}"]
    first = start(*RUN, "--node-rank", "0", *more)
    killed = start(*RUN, "--node-rank", "1", *more)
    store = _store_of_nodes(port)
    store.wait(["1"], timedelta(seconds=30))
    killed.popen.kill()
    killed.popen.wait()
    before = store.get("1")
    again = start(*RUN, "--node-rank", "1", *more)
    deadline = time.monotonic() + 30
    while store.get("1") == before and time.monotonic() < deadline:
        time.sleep(0.05)
    last = start(*RUN, "--node-rank", "2", *more)
    assert [node.finish().status for node in (first, again, last)] == [0, 0, 0]


def _store_of_nodes(port: int) -> PrefixStore:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        time.sleep(0.05)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return PrefixStore("torchweft/nodes", store)


def test_a_failure_says_how_many_ranks_there_were(run, tmp_path: Path) -> None:
    """Not how many there might have been."""
    script = tmp_path / "train.py"
    script.write_text(
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', strategy='ddp')\n"
        "fabric.launch()\n"
        "assert fabric.global_rank == 0, 'enough'\n"
        "fabric.barrier()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    more = ["--rdzv-conf", "last_call_timeout=1", "--devices", "2", "--num-nodes", "1:4"]
    done = run(*RUN, *where, *more, script)
    assert done.status == 1
    assert done.err.startswith("torchweft: rank 1 of 2 failed: AssertionError: enough\n"), done.err


def test_a_node_too_many(start, tmp_path: Path) -> None:
    """It stands by, and has not failed where nobody needed it."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', strategy='ddp')\n"
        "fabric.launch()\n"
        "Path(sys.argv[1], f'rank-{fabric.global_rank}').touch()\n"
        "while not Path(sys.argv[1], 'stop').exists():\n"
        "    time.sleep(0.05)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    nodes = [start(*RUN, *where, "--num-nodes", "2", script, tmp_path) for _ in range(2)]
    until(lambda: (tmp_path / "rank-1").exists(), *nodes)
    spare = start(*RUN, *where, "--num-nodes", "2", script, tmp_path)
    until(lambda: _reaches(spare, port), spare, *nodes)
    time.sleep(3)  # by which it is known to be one too many
    (tmp_path / "stop").touch()
    assert [node.finish().status for node in nodes] == [0, 0]
    done = spare.finish()
    assert (done.status, done.out) == (0, "")
    assert done.err == "torchweft: the run ended without this node, which was one too many\n"


def test_a_node_that_is_told_to_end_between_two_attempts(start, tmp_path: Path) -> None:
    """Its ranks, which would have left by themselves, are gone: it waits for none of them."""
    script = tmp_path / "train.py"
    script.write_text(
        "import time\n"
        "from torchweft import Fabric\n"
        "fabric = Fabric(accelerator='cpu', strategy='ddp')\n"
        "fabric.launch()\n"
        "while not fabric.should_stop:\n"
        "    time.sleep(0.05)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    nodes = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        more = ["--num-nodes", "2", "--max-restarts", "1", script]
        nodes.append(start(*RUN, *where, *more, environ={"TMPDIR": str(folder)}))
        if number == 0:
            _store_of_nodes(port)  # which this one serves then

    def minding(number: int) -> bool:
        return any((tmp_path / str(number)).glob("torchweft-*/*/attempt_*/0/*.minding"))

    until(lambda: minding(0) and minding(1), *nodes)
    nodes[1].popen.kill()
    until(lambda: not minding(0), nodes[0])
    nodes[0].popen.terminate()
    done = nodes[0].finish(20)
    assert done.status == 143
    assert "beginning anew, attempt 2 of 2" in done.err


def _reaches(command: Command, port: int) -> bool:
    """Whether it has been to the rendezvous."""
    there = psutil.Process(command.popen.pid).net_connections("tcp")
    return any(c.raddr and c.raddr.port == port and c.status == "ESTABLISHED" for c in there)


@pytest.mark.parametrize("given", ["a", "a=1,b", "=1"])
def test_settings_of_the_backend(given: str, run) -> None:
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:1"]
    done = run(*RUN, *endpoint, "--rdzv-conf", given, SCRIPT, "{}")
    assert done.status == 2
    assert f"--rdzv-conf takes 'key=value,key=value'; it was given '{given}'" in done.err


@pytest.mark.parametrize(
    ("backend", "given", "words"),
    [
        (
            "c10x",
            "a=1",
            (
                "torch has no rendezvous 'c10x' (--rdzv-backend); did you mean 'c10d'? there are "
                "c10d, etcd, etcd-v2, static; others come from packages with an entry point in the "
                "group 'torchrun.handlers'"
            ),
        ),
        (
            "c10d",
            "lastcall_timeout=3",
            (
                "the rendezvous 'c10d' has no setting 'lastcall_timeout' (--rdzv-conf); did you "
                "mean 'last_call_timeout'? it reads close_timeout, heartbeat_timeout, is_host, join"
            ),
        ),
        (
            "c10d",
            "read_timeout=soon",
            "--rdzv-conf read_timeout=soon: read_timeout is a whole number above 0, such as read_t",
        ),
        ("c10d", "store_type=disk", "store_type=disk: store_type is one of tcp, file"),
    ],
)
def test_what_no_rendezvous_knows(backend: str, given: str, words: str, run) -> None:
    endpoint = ["--rdzv-backend", backend, "--rdzv-endpoint", "127.0.0.1:1"]
    done = run(*RUN, *endpoint, "--rdzv-conf", given, SCRIPT, "{}")
    assert done.status == 2
    assert words in done.err
    assert "Traceback" not in done.err


@pytest.fixture
def pair(start, tmp_path: Path) -> Callable[..., list[Command]]:
    """Start two nodes of this computer, whose script does what it is told on node 1."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def begin(how: str, *, devices: tuple[int, int] = (1, 1), c10d: bool = False) -> list[Command]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        made = []
        for node in (0, 1):
            place = ["--node-rank", str(node), "--main-address", "127.0.0.1", "--main-port", port]
            if c10d:
                place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            run = [sys.executable, "-m", "torchweft", "run", "--devices", str(devices[node])]
            made.append(start(*run, "--num-nodes", "2", *place, script, how, tmp_path))
        return made

    return begin


TRAIN = """
import os, sys, time
from pathlib import Path
from torchweft import Fabric

how, folder = sys.argv[1:]
fabric = Fabric(accelerator="cpu", strategy="ddp")
rank = os.environ["RANK"]
Path(folder, f"ready-{rank}").touch()
if how == "before" and rank == "1":
    raise ValueError("enough")
if how == "wait" and rank == "1":
    time.sleep(600)
fabric.launch()
fabric.barrier()
if how == "behind" and rank == "1":
    raise ValueError("enough")
Path(folder, f"met-{rank}").touch()
if how == "met" and rank == "1":
    time.sleep(600)
if how != "well":
    fabric.barrier()
    time.sleep(600)
"""


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_rank_of_another_node_fails(when: str, pair) -> None:
    """Before the ranks have met, those of node 0 would wait for half an hour."""
    first, second = [command.finish() for command in pair(when)]
    assert second.status == 1
    assert second.err.startswith("torchweft: rank 1 of 2 failed: ValueError: enough\n")
    assert "Traceback (most recent call last):" in second.err
    assert first.status == 1
    assert re.fullmatch(
        r"torchweft: rank 1 of 2 failed: ValueError: enough\n"
        r"(on \S+, process \d+, with exit status 1\n)?"
        rf"in full in the output of node 1 \({re.escape(socket.gethostname())}\)\n"
        r"(here rank 0 of 2 lost another: RuntimeError: .*\n)?",
        first.err,
    )


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_rank_of_another_node_fails_behind_c10d(when: str, pair) -> None:
    ended = [command.finish() for command in pair(when, c10d=True)]
    assert [done.status for done in ended] == [1, 1]
    for done in ended:
        assert done.err.startswith("torchweft: rank 1 of 2 failed: ValueError: enough\n"), done.err
    full = ["Traceback (most recent call last):" in done.err for done in ended]
    assert sorted(full) == [False, True]
    other = ended[full.index(False)].err
    assert f"\nin full in the output of {socket.gethostname()}:" in other


def test_nodes_that_end_well(pair) -> None:
    assert [(done.status, done.err) for done in map(Command.finish, pair("well"))] == [(0, "")] * 2


def test_another_node_is_told_to_end(pair, tmp_path: Path) -> None:
    first, second = pair("wait")
    until(lambda: (tmp_path / "ready-1").exists(), first, second)
    second.popen.terminate()
    assert (second.finish().status, first.finish().status) == (143, 1)
    assert first.finish().err.startswith("torchweft: node 1 of 2 was told to end by SIGTERM\n")


def test_node_0_is_killed(pair, tmp_path: Path) -> None:
    first, second = pair("wait")
    until(lambda: (tmp_path / "ready-1").exists(), first, second)
    first.popen.kill()
    assert second.finish().status == 1
    assert second.finish().err == (
        "torchweft: node 0 of 2 has gone, and its command with it; see whether its computer, the "
        "network or its command was ended\n"
    )


def test_a_node_is_killed_whose_ranks_have_met(pair, tmp_path: Path) -> None:
    first, second = pair("met")
    until(lambda: all((tmp_path / f"met-{rank}").exists() for rank in (0, 1)), first, second)
    second.popen.kill()
    done = first.finish()
    assert done.status == 1
    assert done.err.startswith("torchweft: rank 0 of 2 lost another: RuntimeError: ")
    assert "\nno other node told why; see whether one, or its command, was ended\n" in done.err


def test_nodes_with_different_numbers_of_processes(pair) -> None:
    for done in map(Command.finish, pair("well", devices=(1, 2))):
        assert done.status == 1
        assert done.err == (
            "error: --devices makes a different number of processes on the nodes: 1 on node 0, 2 "
            "on node 1; give every node the same number\n"
        )


def test_nodes_with_different_numbers_of_processes_behind_c10d(pair) -> None:
    for done in map(Command.finish, pair("well", devices=(1, 2), c10d=True)):
        assert done.status == 1
        assert re.match(
            r"torchweft: rank \d of \d failed: InvalidRequest: 'torchweft run' started this "
            r"process, but the nodes have different numbers of processes: [12] of 3 are on this "
            r"one of 2 nodes; give every node the same --devices \(torchrun: --nproc-per-node\)\n",
            done.err,
        )


@pytest.mark.parametrize("given", ["localhost:70000", "localhost:0", "localhost:a", ":", "::1"])
def test_what_is_no_endpoint(given: str, run) -> None:
    place = ["--num-nodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", given]
    done = run(*RUN, *place, "--join-timeout", "2", SCRIPT, "{}")
    assert done.status == 2
    assert done.err == (
        "error: --rdzv-endpoint takes HOST:PORT, with a port from 1 to 65535, and [HOST]:PORT for "
        f"an address of IPv6; it was given '{given}'\n"
    )


def test_nobody_at_the_endpoint(run) -> None:
    """192.0.2.0/24 is for documentation: nobody has it."""
    place = ["--num-nodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "192.0.2.77:29555"]
    done = run(*RUN, *place, "--join-timeout", "3", SCRIPT, "{}")
    assert done.status == 1
    assert re.fullmatch(
        "error: this node cannot reach --rdzv-endpoint 192.0.2.77:29555 after 3 s: .+; start the "
        "command on the node with that address, see that no firewall is between, or raise "
        "--join-timeout\n",
        done.err,
    )
