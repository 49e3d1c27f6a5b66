"""Where ranks meet that somebody outside made: rank 0 hosts the store on a port all of them know.

Nobody made a socket for them beforehand, so that the port may be in use by now, and the name of
the first node may mean nothing here.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from torchweft.api import RankInfo, Rendezvous
from torchweft.errors import InvalidRequest, NotAvailable

__all__ = ["Place", "meet"]

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a launcher proposes, and the words for why.

    Attributes:
        address: of the first node.
        address_from: where that comes from, as in ``the first node of GRID_NODES``.
        port: computed alike by every rank.
        port_from: where that comes from, as in ``which follows from job 7``.
    """

    address: str
    address_from: str
    port: int
    port_from: str


def meet(rank: RankInfo, environ: Mapping[str, str], place: Place) -> Rendezvous:
    """Where this rank meets the others; on rank 0 it listens there from now on.

    ``MASTER_ADDR`` and ``MASTER_PORT`` win. Ranks of one node meet on loopback, and nothing
    listens elsewhere; those of several meet at the first node, which listens on every interface,
    since a node's own name often means loopback to itself.

    Raises:
        NotAvailable: for an address that does not resolve, and for a port that cannot be had.
        InvalidRequest: for a ``MASTER_PORT`` that is no port.
    """
    prefix = f"torchweft/{rank.run_id}/{rank.restart}"
    if rank.world_size == 1:
        return Rendezvous(hosts=True, prefix=prefix)
    alone = rank.world_size == rank.local_world_size
    place = _wished(_on_loopback(place) if alone else place, environ)
    family, numeric = _resolved(place)
    first = rank.rank == 0
    return Rendezvous(
        address=place.address,
        port=place.port,
        listen_fd=_listen(place, family, numeric if alone else "") if first else None,
        hosts=first,
        prefix=prefix,
    )


def _on_loopback(place: Place) -> Place:
    return Place(
        address=_LOOPBACK,
        address_from="where ranks of one node meet",
        port=place.port,
        port_from=place.port_from,
    )


def _wished(place: Place, environ: Mapping[str, str]) -> Place:
    """The place with what the user set."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise InvalidRequest(
            f"the environment variable MASTER_PORT is '{port}'; it takes a number from 1 to 65535, "
            f"the same on every rank, or leave it out, and it is {place.port}, {place.port_from}"
        )
    return Place(
        address=address or place.address,
        address_from="from MASTER_ADDR" if address else place.address_from,
        port=int(port) if port else place.port,
        port_from="from MASTER_PORT" if port else place.port_from,
    )


def _resolved(place: Place) -> tuple[int, str]:
    """The family and the number of the address."""
    try:
        found = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise NotAvailable(
            f"the ranks meet at '{place.address}' ({place.address_from}), which does not resolve "
            f"here: {words}; set MASTER_ADDR, on every rank alike, to a name or an address of the "
            "first node that every node knows"
        ) from None
    return found[0][0], str(found[0][4][0])


def _listen(place: Place, family: int, address: str) -> int | None:
    """A socket that listens on the address, on every interface for an empty one.

    None where an earlier Fabric of this process hosts the store there, which is used again.
    """
    try:
        if address:
            listener = socket.create_server((address, place.port), family=family, backlog=1024)
        else:
            listener = _everywhere(place.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_ours(place.port):
            return None
        number = error.errno or 0
        instead = _INSTEAD.get(number, "set MASTER_ADDR and MASTER_PORT")
        raise NotAvailable(
            f"rank 0 cannot listen on port {place.port} ({place.port_from}) of '{place.address}' "
            f"({place.address_from}): {os.strerror(number)}; {instead}, on every rank alike"
        ) from None
    return listener.detach()


#: What to do about it, by the reason why a socket cannot listen.
_INSTEAD = {
    errno.EADDRINUSE: "set MASTER_PORT to another one that is free",
    errno.EACCES: "set MASTER_PORT to one above 1023",
    errno.EADDRNOTAVAIL: "set MASTER_ADDR to an address of the first node, or unset it",
}


def _everywhere(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        # A kernel may have it switched off all the same.
        with suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
    return socket.create_server(("", port), backlog=1024)


def _is_ours(port: int) -> bool:
    """Whether it is this process that listens on the port."""
    for name in os.listdir("/dev/fd"):
        # It is no socket, or closed by now.
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as other:
            listens = other.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listens and other.getsockname()[1] == port:
                return True
    return False
