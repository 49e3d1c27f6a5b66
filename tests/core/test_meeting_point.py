from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from torchweft.builtin.launchers.meeting_point import PORTS, MeetingPoint, port_of
from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.rank import RankInfo, Rendezvous

HERE = socket.gethostname()
ONE_NODE = RankInfo(rank=0, world_size=2, local_rank=0, local_world_size=2, run_id="job")
TWO_NODES = RankInfo(rank=0, world_size=4, local_rank=0, local_world_size=2, run_id="job")


def second(rank: RankInfo) -> RankInfo:
    return replace(rank, rank=1, local_rank=1)


def point(
    rank: RankInfo, environ: dict[str, str], *, job: str = "job", first_node: str = ""
) -> MeetingPoint:
    return MeetingPoint.of(
        rank,
        environ,
        job=job,
        first_node=first_node,
        first_node_from="the first in HOSTS" if first_node else "",
        set_address="start -x MASTER_ADDR=HOST",
        set_port="start -x MASTER_PORT=PORT",
    )


@pytest.fixture
def free() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def listening(rendezvous: Rendezvous) -> socket.socket:
    assert rendezvous.listen_fd is not None
    return socket.socket(fileno=rendezvous.listen_fd)


# -- what is chosen -------------------------------------------------------------------------------


def test_one_node_meets_on_loopback_at_the_jobs_port() -> None:
    found = point(ONE_NODE, {})
    assert (found.address, found.port) == ("127.0.0.1", port_of("job"))
    assert found.port in PORTS


def test_the_environment_wins() -> None:
    found = point(ONE_NODE, {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    assert (found.address, found.port) == ("localhost", 29500)
    assert point(TWO_NODES, {"MASTER_ADDR": "b"}, first_node="a").address == "b"
    assert point(TWO_NODES, {}, first_node="a").address == "a"
    assert point(ONE_NODE, {}, first_node="a").address == "127.0.0.1"


def test_jobs_have_ports_of_their_own() -> None:
    ports = [port_of(f"{number}-{number + 65536}") for number in range(100)]
    assert len(set(ports)) == len(ports)
    assert all(10000 <= port < 30000 for port in ports)


def test_nobody_names_the_first_node() -> None:
    with pytest.raises(
        NotAvailable,
        match=r"^the 4 ranks are on 2 nodes, and nothing in the environment says where rank 0 is; "
        r"name its host for all of them: start -x MASTER_ADDR=HOST$",
    ):
        point(TWO_NODES, {})


def test_nothing_to_tell_a_port_by() -> None:
    with pytest.raises(NotAvailable, match=r"choose one for all of them: start -x MASTER_PORT=PO"):
        point(ONE_NODE, {}, job="")
    assert point(ONE_NODE, {"MASTER_PORT": "29500"}, job="").port == 29500


@pytest.mark.parametrize("text", ["", "http", "0", "65536", "-1", "٢"])
def test_a_port_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        point(ONE_NODE, {"MASTER_PORT": text})
    assert str(caught.value) == (
        f"the environment variable MASTER_PORT is '{text}'; it takes a port from 1 to 65535: "
        "start -x MASTER_PORT=PORT"
    )


# -- meeting --------------------------------------------------------------------------------------


def test_rank_0_listens_on_loopback_alone(free: int) -> None:
    found = point(ONE_NODE, {"MASTER_PORT": str(free)}).rendezvous(ONE_NODE)
    with listening(found) as server:
        assert server.getsockname() == ("127.0.0.1", free)
        other = point(ONE_NODE, {"MASTER_PORT": str(free)}).rendezvous(second(ONE_NODE))
    assert (found.hosts, other.hosts, other.listen_fd) == (True, False, None)
    assert found.prefix == other.prefix == "torchweft/job/0"
    assert found.loopback
    assert other.port == free


def own_address() -> str | None:
    """One that other computers know this one by; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        found: str = probe.getsockname()[0]
    return None if found.startswith("127.") else found


def test_on_several_nodes_it_listens_everywhere(free: int) -> None:
    address = own_address()
    if address is None:
        pytest.skip("this computer has no address but loopback")
    found = point(TWO_NODES, {"MASTER_ADDR": address, "MASTER_PORT": str(free)})
    with listening(found.rendezvous(TWO_NODES)) as server:
        assert server.getsockname()[:2] in (("::", free), ("0.0.0.0", free))
        assert not found.rendezvous(second(TWO_NODES)).loopback


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (True, "MASTER_PORT chose it"),
        (False, "it follows from the job's id, 'job'"),
    ],
)
def test_a_port_in_use(free: int, chosen: bool, words: str) -> None:
    port = free if chosen else port_of("job")
    environ = {"MASTER_PORT": str(port)} if chosen else {}
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(NotAvailable) as caught:
            point(ONE_NODE, environ).rendezvous(ONE_NODE)
    assert str(caught.value) == (
        f"port {port} of {HERE}, on which rank 0 is to serve the run's store, is in use; {words}; "
        "choose another for all ranks: start -x MASTER_PORT=PORT"
    )


@pytest.mark.parametrize("rank", [TWO_NODES, second(TWO_NODES)])
@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b"])
def test_an_address_that_does_not_resolve(rank: RankInfo, name: str) -> None:
    with pytest.raises(NotAvailable) as caught:
        point(rank, {"MASTER_ADDR": name}).rendezvous(rank)
    words = str(caught.value)
    assert words.startswith(
        f"the address of rank 0, '{name}' (MASTER_ADDR names it), does not resolve on {HERE}: "
    )
    assert words.endswith("; set one that all nodes know: start -x MASTER_ADDR=HOST")


def test_a_name_may_take_its_time() -> None:
    patient = replace(point(TWO_NODES, {"MASTER_ADDR": "no-such-host.invalid"}), patience=0.3)
    begun = time.monotonic()
    with pytest.raises(NotAvailable, match="does not resolve"):
        patient.rendezvous(TWO_NODES)
    assert time.monotonic() - begun >= 0.3


def test_an_address_of_another_computer() -> None:
    # Of a network that is for documentation alone.
    there = point(TWO_NODES, {}, first_node="192.0.2.77")
    with pytest.raises(NotAvailable) as caught:
        there.rendezvous(TWO_NODES)
    assert str(caught.value) == (
        f"rank 0 is on {HERE}, and the address at which the others look for it is '192.0.2.77' "
        "(the first in HOSTS), which is another computer's; name the host of rank 0: start -x "
        "MASTER_ADDR=HOST"
    )


def test_an_address_that_passes_on_may_be_another_ones(free: int) -> None:
    environ = {"MASTER_ADDR": "192.0.2.77", "MASTER_PORT": str(free)}
    with listening(
        replace(point(TWO_NODES, environ), by_name=True).rendezvous(TWO_NODES)
    ) as server:
        assert server.getsockname()[1] == free


@pytest.mark.parametrize("rank", [TWO_NODES, second(TWO_NODES)])
def test_loopback_is_no_address_for_several_nodes(rank: RankInfo) -> None:
    with pytest.raises(InvalidRequest) as caught:
        point(rank, {"MASTER_ADDR": "localhost"}).rendezvous(rank)
    assert str(caught.value) == (
        "the address of rank 0 is 'localhost' (MASTER_ADDR names it), which means another "
        "computer on each of the 2 nodes; name the host of rank 0: start -x MASTER_ADDR=HOST"
    )


# -- waiting for rank 0 ---------------------------------------------------------------------------


def test_rank_0_never_comes(free: int) -> None:
    rank = second(ONE_NODE)
    there = replace(point(rank, {"MASTER_PORT": str(free)}), wait=0.3)
    with pytest.raises(NotAvailable) as caught:
        there.rendezvous(rank)
    assert str(caught.value) == (
        f"rank 1 of 2 looked 0.3 s for rank 0 at port {free} of 127.0.0.1, where nobody answers: "
        "Connection refused; all ranks are on one node, and the port: MASTER_PORT chose it; see "
        "whether rank 0 runs, or whether something keeps the two apart"
    )


def test_rank_0_comes_late(free: int) -> None:
    def come() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", free)) as server:
            server.accept()[0].close()

    late = threading.Thread(target=come)
    late.start()
    rank = second(ONE_NODE)
    begun = time.monotonic()
    point(rank, {"MASTER_PORT": str(free)}).rendezvous(rank)
    assert time.monotonic() - begun >= 0.25
    late.join()


# -- where nobody has to meet ---------------------------------------------------------------------


def test_one_process_meets_nobody() -> None:
    alone = RankInfo(run_id="job")
    assert point(alone, {}).rendezvous(alone) == Rendezvous(prefix="torchweft/job/0")


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_who_has_met_needs_no_port(free: int) -> None:
    with socket.create_server(("127.0.0.1", free)):
        found = point(ONE_NODE, {"MASTER_PORT": str(free)}).rendezvous(ONE_NODE)
    assert (found.hosts, found.listen_fd) == (False, None)
