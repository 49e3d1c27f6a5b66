"""Where ranks meet that somebody outside made: the first node, and a port that all can tell."""

from __future__ import annotations

import errno
import socket
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from torchweft.errors import InvalidRequest, NotAvailable
from torchweft.rank import RankInfo, Rendezvous

__all__ = ["PORTS", "MeetingPoint", "port_of"]

#: Of these, a job's id picks one. Below those that the kernel gives to outgoing connections.
PORTS = range(10000, 30000)

_LOOPBACK = "127.0.0.1"
#: Seconds between two looks at something that is not there yet.
_PAUSE = 0.05
#: Seconds for one attempt to reach rank 0.
_ATTEMPT = 5.0


def port_of(job: str) -> int:
    """The port of a job, the same in all of its ranks."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPoint:
    """An address and a port, with what errors say of them.

    Attributes:
        address: of the node of rank 0.
        port: on which rank 0 serves the store.
        address_from: who chose the address; a clause.
        port_from: who chose the port; a clause.
        set_address: how to set another address for all ranks.
        set_port: how to set another port for all ranks.
        patience: seconds in which a name may become one that resolves.
        by_name: whether the address may belong to something that passes connections on, so that
            the node of rank 0 need not have it.
        wait: seconds in which rank 0 has to listen.
    """

    address: str
    port: int
    address_from: str
    port_from: str
    set_address: str
    set_port: str
    patience: float = 0.0
    by_name: bool = False
    wait: float = 1800.0

    @classmethod
    def of(
        cls,
        rank: RankInfo,
        environ: Mapping[str, str],
        *,
        job: str,
        first_node: str,
        first_node_from: str,
        set_address: str,
        set_port: str,
    ) -> MeetingPoint:
        """What ``MASTER_ADDR`` and ``MASTER_PORT`` say; else loopback or the first node, and the
        port of the job.

        ``job`` and ``first_node`` are empty where the environment does not tell them. Raises
        ``NotAvailable`` where something has to be set, and ``InvalidRequest`` where what is set
        can mean nothing.
        """
        address, address_from = environ.get("MASTER_ADDR", ""), "MASTER_ADDR names it"
        if not address and rank.local_world_size == rank.world_size:
            address, address_from = _LOOPBACK, "all ranks are on one node"
        if not address:
            address, address_from = first_node, first_node_from
        if not address:
            nodes = rank.world_size // rank.local_world_size
            raise NotAvailable(
                f"the {rank.world_size} ranks are on {nodes} nodes, and nothing in the environment "
                f"says where rank 0 is; name its host for all of them: {set_address}"
            )
        if "MASTER_PORT" in environ:
            port, port_from = _port(environ["MASTER_PORT"], set_port), "MASTER_PORT chose it"
        elif job:
            port, port_from = port_of(job), f"it follows from the job's id, '{job}'"
        else:
            raise NotAvailable(
                "nothing in the environment tells this job from others, so that the ranks cannot "
                f"agree on a port by themselves; choose one for all of them: {set_port}"
            )
        return cls(
            address=address,
            port=port,
            address_from=address_from,
            port_from=port_from,
            set_address=set_address,
            set_port=set_port,
        )

    def rendezvous(self, rank: RankInfo) -> Rendezvous:
        """Where this rank meets the others; rank 0 listens from here on.

        Raises ``NotAvailable`` or ``InvalidRequest`` where they cannot meet there.
        """
        prefix = f"torchweft/{rank.run_id}/{rank.restart}"
        first = rank.rank == 0
        if rank.world_size == 1:
            return Rendezvous(prefix=prefix)
        if dist.is_initialized():
            # They have met, for another Fabric of this script or by the user's own call.
            return Rendezvous(address=self.address, port=self.port, prefix=prefix)
        plain = Rendezvous(address=self.address, port=self.port, prefix=prefix, hosts=first)
        if plain.loopback and rank.local_world_size < rank.world_size:
            raise InvalidRequest(
                f"the address of rank 0 is '{self.address}' ({self.address_from}), which means "
                f"another computer on each of the {rank.world_size // rank.local_world_size} "
                f"nodes; name the host of rank 0: {self.set_address}"
            )
        found = self._resolve()
        if not first:
            self._wait_for_rank_0(rank)
            return plain
        if not plain.loopback and not self.by_name:
            self._check_mine(found)
        return Rendezvous(
            address=self.address,
            port=self.port,
            prefix=prefix,
            hosts=True,
            listen_fd=self._listen(everywhere=not plain.loopback),
        )

    def _resolve(self) -> list[tuple[int, str]]:
        """Families and addresses that the name stands for."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                found = socket.getaddrinfo(self.address, self.port, type=socket.SOCK_STREAM)
                return [(family, str(place[0])) for family, _, _, _, place in found]
            # UnicodeError: a name that no host can have.
            except (OSError, UnicodeError) as error:
                if time.monotonic() < deadline:
                    time.sleep(_PAUSE)
                    continue
                why = getattr(error, "strerror", None) or str(error)
                raise NotAvailable(
                    f"the address of rank 0, '{self.address}' ({self.address_from}), does not "
                    f"resolve on {socket.gethostname()}: {why}; set one that all nodes know: "
                    f"{self.set_address}"
                ) from None

    def _wait_for_rank_0(self, rank: RankInfo) -> None:
        """Return once somebody answers. torch's own waiting ends in a page of C++ frames."""
        deadline, pause = time.monotonic() + self.wait, _PAUSE
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=_ATTEMPT).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise NotAvailable(
                        f"rank {rank.rank} of {rank.world_size} looked {self.wait:g} s for rank 0 "
                        f"at port {self.port} of {self.address}, where nobody answers: "
                        f"{error.strerror or error}; {self.address_from}, and the port: "
                        f"{self.port_from}; see whether rank 0 runs, or whether something keeps "
                        "the two apart"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _check_mine(self, found: list[tuple[int, str]]) -> None:
        for family, place in found:
            try:
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.bind((place, 0))
                    return
            except OSError:
                continue
        raise NotAvailable(
            f"rank 0 is on {socket.gethostname()}, and the address at which the others look for it "
            f"is '{self.address}' ({self.address_from}), which is another computer's; name the "
            f"host of rank 0: {self.set_address}"
        )

    def _listen(self, *, everywhere: bool) -> int:
        """The descriptor of a socket that listens; on loopback alone where the run stays there."""
        try:
            if not everywhere:
                found = self._resolve()[0]
                family = socket.AddressFamily(found[0])
                listening = socket.create_server((found[1], self.port), family=family)
            elif socket.has_dualstack_ipv6():
                listening = socket.create_server(
                    ("", self.port), family=socket.AF_INET6, dualstack_ipv6=True
                )
            else:
                listening = socket.create_server(("", self.port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "is in use" if in_use else f"cannot be had: {error.strerror}"
            raise NotAvailable(
                f"port {self.port} of {socket.gethostname()}, on which rank 0 is to serve the "
                f"run's store, {why}; {self.port_from}; choose another for all ranks: "
                f"{self.set_port}"
            ) from None
        return listening.detach()


def _port(text: str, set_port: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= port <= 65535:
        raise InvalidRequest(
            f"the environment variable MASTER_PORT is '{text}'; it takes a port from 1 to 65535: "
            f"{set_port}"
        )
    return port
