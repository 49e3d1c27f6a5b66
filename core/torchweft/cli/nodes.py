"""Where the agents of several nodes meet, and who is missing there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import queue
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from torchweft.cli.rendezvous import split_endpoint
from torchweft.errors import InvalidRequest, NotAvailable, TorchweftError, listed

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["Meeting", "meet"]

#: The port on which nodes meet when none is named, as torchrun's c10d.
_PORT = 29400
_TICK = 0.05
#: Linux's request for the address of an interface.
_SIOCGIFADDR = 0x8915
#: Seconds for which a node waits longer than node 0, which then says who is missing.
_LATER = 5.0
_TIDINGS = "torchweft/tidings"
#: Seconds in which this node reaches itself.
_NEAR = 5.0


@dataclass(slots=True, kw_only=True)
class Meeting:
    """Where nodes meet.

    Attributes:
        endpoint: ``host:port`` for the agent.
        configs: of its rendezvous.
        store: kept for as long as the run lasts; None where the agent makes it.
        join: gives a store of all nodes for what they tell each other; None: there is none.
        serves: whether that is served by this node.
        address: of this node, by which the others reach it; empty on one node.
        interface: that has it; empty where it is not known.
    """

    endpoint: str
    configs: dict[str, Any] = field(default_factory=dict)
    store: Any = None
    join: Callable[[], Any] | None = None
    serves: bool = False
    address: str = ""
    interface: str = ""


def meet(job: Job) -> Meeting:
    """Find or open the place, and wait until the other nodes of a fixed number are there.

    Raises ``NotAvailable`` for an address that leads nowhere and ``TorchweftError`` for a port
    that is taken, a node 0 that does not answer, or nodes that do not come in time.
    """
    limit = int(job.join_timeout)
    configs: dict[str, Any] = {"join_timeout": limit, "timeout": limit, **dict(job.rdzv_conf)}
    if job.rdzv_endpoint:
        return _at_endpoint(job, job.rdzv_endpoint, configs)
    address = job.main_address or "127.0.0.1"
    _check_resolves(address, f"--main-address {address}")
    configs["rank"] = job.node_rank
    if job.num_nodes == 1:
        store, port_ = _listen(address, job.main_port or 0, several=False)
        return Meeting(endpoint=f"{address}:{port_}", configs=configs, store=store)
    assert isinstance(job.num_nodes, int)  # an elastic number has no static rendezvous
    number = job.main_port or _PORT
    deadline = time.monotonic() + job.join_timeout
    if job.node_rank == 0:
        store, _ = _listen(address, number, several=True)
        _await_all(PrefixStore("torchweft/nodes", store), job, deadline)
    else:
        store = _connect(address, number, job, deadline)
        _arrive(PrefixStore("torchweft/nodes", store), job, deadline)
    meeting = Meeting(
        endpoint=f"{address}:{number}",
        configs=configs,
        store=store,
        join=lambda: PrefixStore(_TIDINGS, store),
        serves=job.node_rank == 0,
    )
    return _from_here(meeting, address)


def _at_endpoint(job: Job, endpoint: str, configs: dict[str, Any]) -> Meeting:
    if job.rdzv_backend != "c10d":  # whose endpoint may be no host, and has another usual port
        meeting = Meeting(endpoint=endpoint, configs=configs)
        with contextlib.suppress(InvalidRequest, OSError):
            return _from_here(meeting, split_endpoint(endpoint)[0])
        return meeting
    host, port = split_endpoint(endpoint)
    _check_resolves(host, f"--rdzv-endpoint {endpoint}")
    number = port or _PORT
    meeting = Meeting(endpoint=f"{host}:{number}", configs=configs)
    if configs.get("store_type") != "file":
        _decide_host(meeting, host, number)
        deadline = time.monotonic() + job.join_timeout
        if not meeting.serves:
            _reach(host, number, deadline, _no_host(job))
        prefix = f"{_TIDINGS}/{job.run_id}"
        meeting.join = lambda: PrefixStore(prefix, _reach(host, number, deadline, _no_host(job)))
    return _from_here(meeting, host)


def _decide_host(meeting: Meeting, host: str, port: int) -> None:
    """Whether this node serves the store.

    torch goes by the computer's name, which may be that of another interface or none.
    """
    given = meeting.configs.get("is_host")
    if given is not None:
        meeting.serves = str(given).lower() in ("true", "yes", "t", "y", "1")
        return
    if _may_host(host, port):
        # Of several commands on this computer one gets the port; torch's own takes this for its.
        with contextlib.suppress(RuntimeError):
            meeting.store = TCPStore(
                host, port, is_master=True, wait_for_workers=False, multi_tenant=True
            )
    meeting.serves = meeting.configs["is_host"] = meeting.store is not None


def _from_here(meeting: Meeting, host: str) -> Meeting:
    """How this node is reached: on the way to the others, whatever its name resolves to."""
    family, _, _, _, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        meeting.address = probe.getsockname()[0]
        meeting.interface = _interface(meeting.address)
    return meeting


def _interface(address: str) -> str:
    """The name of the network interface with that address; empty where the system does not tell."""
    if ":" in address:
        digits = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                if line.startswith(digits):
                    return line.split()[-1]
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                asked = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _check_resolves(host: str, said: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise NotAvailable(
            f"{said}: '{host}' does not resolve here ({error.strerror or error}); give an address "
            "by which this node reaches it, or see /etc/hosts and the name service"
        ) from error


def _may_host(host: str, port: int) -> bool:
    """Whether that is an address of this node, on which nobody listens yet."""
    with contextlib.suppress(OSError), _bound(host, port):
        return True
    return False


def _bound(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _listen(address: str, port: int, *, several: bool) -> tuple[Any, int]:
    """A store on that address alone; on all, where this node knows it by another one."""
    elsewhere = False
    try:
        try:
            listener = _bound(address, port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            listener = _bound("0.0.0.0", port)
            elsewhere = True
        listener.listen(1024)
    except OSError as error:
        raise TorchweftError(
            f"cannot listen on {address}:{port}: {error.strerror}; "
            + (
                "choose another --main-port, the same on every node"
                if several
                else "choose another --main-port, or leave it out and a free one is taken"
            )
        ) from error
    number = listener.getsockname()[1]
    if elsewhere:
        _check_leads_here(address, number)
    make = partial(
        TCPStore,
        address,
        number,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    store = _opened(make, 2 * _NEAR)
    if store is None:
        raise NotAvailable(_not_here(address, f"another program answers at port {number} of it"))
    return store, number


def _check_leads_here(address: str, port: int) -> None:
    try:
        socket.create_connection((address, port), timeout=_NEAR).close()
    except OSError as error:
        raise NotAvailable(_not_here(address, error.strerror or str(error))) from error


def _not_here(address: str, why: str) -> str:
    return (
        f"--main-address {address} is no address of this node, {socket.gethostname()}, which is "
        f"node 0, and does not lead to it: {why}; give an address of the node that is started with "
        "--node-rank 0"
    )


def _opened(make: Callable[[], Any], seconds: float) -> Any:
    """A store; None where that takes longer: torch waits for ever for a stranger that is silent."""
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def begin() -> None:
        try:
            answers.put((make(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=begin, name="store", daemon=True).start()
    try:
        store, error = answers.get(timeout=seconds)
    except queue.Empty:
        return None
    if error is not None:
        raise error
    return store


def _connect(address: str, port: int, job: Job, deadline: float) -> Any:
    """The store of node 0, once it answers."""
    return _reach(
        address,
        port,
        deadline,
        f"node {job.node_rank} of {job.num_nodes} cannot reach node 0 at {address}:{port} "
        f"(--main-address, --main-port) after {job.join_timeout:g} s: {{why}}; start the command "
        "with --node-rank 0 there, see that no firewall is between, or raise --join-timeout",
    )


def _no_host(job: Job) -> str:
    return (
        f"this node cannot reach --rdzv-endpoint {job.rdzv_endpoint} after {job.join_timeout:g} s: "
        "{why}; start the command on the node with that address, see that no firewall is between, "
        "or raise --join-timeout"
    )


def _reach(address: str, port: int, deadline: float, refusal: str) -> Any:
    """The store there, once it answers. Raises ``TorchweftError`` of ``refusal`` with the ``why``.

    torch would wait for its own time, and prints a page for every try.
    """
    why = "it never answered"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=2).close()
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(_TICK)
            continue
        limit = max(deadline - time.monotonic(), 1)
        make = partial(
            TCPStore,
            address,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=limit),
        )
        try:
            store = _opened(make, limit + 1)
        except RuntimeError as error:
            why = f"another program has that port: {str(error).partition(chr(10))[0]}"
            break
        if store is not None:
            return store
        why = "another program has that port, and is silent"
        break
    raise TorchweftError(refusal.replace("{why}", why))


def _await_all(store: Any, job: Job, deadline: float) -> None:
    """At node 0, until every node has come."""
    most = job.num_nodes if isinstance(job.num_nodes, int) else 1
    others = range(1, most)
    while missing := [rank for rank in others if not store.check([str(rank)])]:
        if time.monotonic() > deadline:
            _refuse(store, _who_is_missing(missing, job))
        time.sleep(_TICK)
    came = {rank: json.loads(store.get(str(rank))) for rank in others}
    devices = {0: job.processes, **{rank: node["devices"] for rank, node in came.items()}}
    if len({*devices.values()}) > 1:
        _refuse(store, _how_they_differ(devices))
    store.set("all", json.dumps([node["command"] for node in came.values()]))


def _refuse(store: Any, told: str) -> NoReturn:
    """End all nodes with that sentence."""
    store.set("refused", told)
    time.sleep(4 * _TICK)  # the others read it from this process
    raise TorchweftError(told)


def _how_they_differ(devices: dict[int, int]) -> str:
    by_number: dict[int, list[str]] = {}
    for rank, number in sorted(devices.items()):
        by_number.setdefault(number, []).append(str(rank))
    parts = [f"{number} on node {listed(ranks)}" for number, ranks in by_number.items()]
    return (
        f"--devices makes a different number of processes on the nodes: {', '.join(parts)}; give "
        "every node the same number"
    )


def _who_is_missing(missing: list[int], job: Job) -> str:
    who = listed([str(rank) for rank in missing])
    return (
        f"{len(missing)} of {job.num_nodes} nodes did not come within {job.join_timeout:g} s "
        f"(--join-timeout): --node-rank {who}; start the command there too, with --main-address "
        f"{job.main_address} and --main-port {job.main_port or _PORT}"
    )


def _arrive(store: Any, job: Job, deadline: float) -> None:
    """At another node: say so, and wait for the rest."""
    # Of several commands with one number the last to come counts: those before it may have ended.
    command = uuid.uuid4().hex
    mine = str(job.node_rank)
    replaced = False
    told = "node 0 went away while it waited for the others"
    with contextlib.suppress(RuntimeError):
        if not store.check(["all"]):
            store.set(mine, json.dumps({"command": command, "devices": job.processes}))
        while time.monotonic() < deadline + _LATER:
            if store.check(["all"]):
                if command in json.loads(store.get("all")):
                    return
                told = _another(job)
                break
            if store.check(["refused"]):
                told = store.get("refused").decode()
                break
            if replaced:
                told = _another(job)
                break
            replaced = json.loads(store.get(mine))["command"] != command
            # Node 0 may have read the number before, and is about to begin with this command.
            time.sleep(5 * _TICK if replaced else _TICK)
    raise TorchweftError(told)


def _another(job: Job) -> str:
    return (
        f"another node has come as --node-rank {job.node_rank}; give each of the {job.num_nodes} "
        "nodes a number of its own, from 0"
    )
