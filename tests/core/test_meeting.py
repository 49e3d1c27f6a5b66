"""Where ranks meet that somebody outside made."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from torchweft.builtin.launchers.meeting import Place, meet
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.rank import RankInfo, Rendezvous

FIRST = RankInfo(rank=0, world_size=2, local_rank=0, local_world_size=2, run_id="grid-7")
SECOND = replace(FIRST, rank=1, local_rank=1)
#: Of two nodes with a rank each.
HEAD = replace(FIRST, local_world_size=1)
TAIL = replace(HEAD, rank=1, node_rank=1)


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found: int = server.getsockname()[1]
    return found


@pytest.fixture
def taken(port: int) -> Iterator[int]:
    """One on which another process listens, as this one is not told by its own sockets."""
    code = f"import socket; s = socket.create_server(('', {port})); print(1, flush=True); input()"
    with psutil.Popen(["python3", "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "1\n"
        yield port
        other.kill()


def place(port: int, address: str = "localhost") -> Place:
    return Place(
        address=address,
        address_from="the first node of GRID_NODES",
        port=port,
        port_from="which follows from job 7",
    )


def listening(rendezvous: Rendezvous) -> Any:
    """The name of the socket; it is closed."""
    assert rendezvous.listen_fd is not None
    with socket.socket(fileno=rendezvous.listen_fd) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return listener.getsockname()


def test_one_rank_meets_nobody() -> None:
    alone = RankInfo(run_id="grid-7", restart=2)
    assert meet(alone, {"MASTER_PORT": "1"}, place(1)) == Rendezvous(
        hosts=True, prefix="torchweft/grid-7/2"
    )


def test_on_one_node_nothing_listens_beyond_loopback(port: int) -> None:
    found = meet(FIRST, {}, place(port, "elsewhere.invalid"))
    assert (found.address, found.port, found.hosts) == ("127.0.0.1", port, True)
    assert found.loopback
    assert listening(found) == ("127.0.0.1", port)
    assert meet(SECOND, {}, place(port)) == replace(found, hosts=False, listen_fd=None)


def test_on_several_nodes_the_first_one_listens_everywhere(port: int) -> None:
    found = meet(HEAD, {}, place(port))
    assert (found.address, found.port, found.prefix) == ("localhost", port, "torchweft/grid-7/0")
    assert listening(found)[:2] in {("::", port), ("0.0.0.0", port)}
    assert meet(TAIL, {}, place(port)) == replace(found, hosts=False, listen_fd=None)


def test_what_the_user_set_wins(port: int) -> None:
    wished = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}
    for rank in (FIRST, HEAD):
        found = meet(rank, wished, place(1))
        assert (found.address, found.port) == ("127.0.0.2", port)
        where = listening(found)
        assert where[1] == port
        # Ranks of one node need no more than what was asked for.
        assert (where[0] == "127.0.0.2") == (rank is FIRST)


def test_a_second_fabric_of_the_process_meets_there_again(port: int) -> None:
    first = meet(FIRST, {}, place(port))
    again = meet(FIRST, {}, place(port))
    assert again == replace(first, listen_fd=None)
    assert again.hosts
    os.close(first.listen_fd or -1)


def test_a_port_that_is_in_use(taken: int) -> None:
    with pytest.raises(NotAvailable) as raised:
        meet(FIRST, {}, place(taken))
    assert str(raised.value) == (
        f"rank 0 cannot listen on port {taken} (which follows from job 7) of '127.0.0.1' (where "
        "ranks of one node meet): Address already in use; set MASTER_PORT to another one that is "
        "free, on every rank alike"
    )
    with pytest.raises(NotAvailable) as raised:
        meet(HEAD, {"MASTER_PORT": str(taken)}, place(1))
    assert str(raised.value) == (
        f"rank 0 cannot listen on port {taken} (from MASTER_PORT) of 'localhost' (the first node "
        "of GRID_NODES): Address already in use; set MASTER_PORT to another one that is free, on "
        "every rank alike"
    )
    # Nobody else needs it.
    assert meet(TAIL, {}, place(taken)).port == taken


def test_an_address_that_is_another_computers(port: int) -> None:
    with pytest.raises(NotAvailable) as raised:
        meet(FIRST, {"MASTER_ADDR": "192.0.2.1"}, place(port))
    assert str(raised.value) == (
        f"rank 0 cannot listen on port {port} (which follows from job 7) of '192.0.2.1' (from "
        "MASTER_ADDR): Cannot assign requested address; set MASTER_ADDR to an address of the first "
        "node, or unset it, on every rank alike"
    )


@pytest.mark.parametrize("rank", [HEAD, TAIL])
def test_an_address_that_does_not_resolve(rank: RankInfo) -> None:
    with pytest.raises(NotAvailable) as raised:
        meet(rank, {}, place(1, "n1.invalid"))
    words = str(raised.value)
    assert words.startswith(
        "the ranks meet at 'n1.invalid' (the first node of GRID_NODES), which does not resolve "
        "here: "
    )
    assert words.endswith(
        "; set MASTER_ADDR, on every rank alike, to a name or an address of the first node that "
        "every node knows"
    )
    with pytest.raises(NotAvailable, match=r"meet at 'a\.\.b' \(from MASTER_ADDR\), which does"):
        meet(rank, {"MASTER_ADDR": "a..b"}, place(1))


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_what_is_no_port(port: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        meet(FIRST, {"MASTER_PORT": port}, place(1234))
    assert str(raised.value) == (
        f"the environment variable MASTER_PORT is '{port}'; it takes a number from 1 to 65535, the "
        "same on every rank, or leave it out, and it is 1234, which follows from job 7"
    )
