"""Joining and leaving ``torch.distributed``'s default process group."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from torchweft.api.place import Place
from torchweft.errors import Misuse
from torchweft.rank import RankInfo, Rendezvous

__all__ = ["Group", "join_group", "leave_group", "open_store"]

#: Seconds that a rank that is done waits for the others before it leaves all the same.
_PATIENCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A membership; ``store`` is None when somebody else made the group and will end it."""

    rank: RankInfo
    store: Store | None


def open_store(rendezvous: Rendezvous, rank: RankInfo) -> Store:
    """The key-value store through which the ranks of a run find each other.

    Never ``env://``: torch's agent keeps one store across restarts, and gloo would then connect
    to the addresses of dead ranks; the prefix is unique to run and restart.
    """
    if rank.world_size == 1 and not rendezvous.port:
        return PrefixStore(rendezvous.prefix, HashStore())
    store = TCPStore(
        rendezvous.address,
        rendezvous.port,
        is_master=rendezvous.hosts,
        timeout=timedelta(seconds=rendezvous.timeout),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=rendezvous.listen_fd if rendezvous.hosts else None,
    )
    return PrefixStore(rendezvous.prefix, store)


def join_group(place: Place, *, backend: str, timeout: timedelta | None = None) -> Group:
    """Join the default process group of the run.

    A group that the user made before is taken as it is. Raises ``Misuse`` when that one is of
    another size.
    """
    rank = place.rank
    if dist.is_initialized():
        if dist.get_world_size() != rank.world_size:
            raise Misuse(
                f"torch.distributed was already initialised with {dist.get_world_size()} "
                f"process(es), and this run has {rank.world_size}; remove your own "
                "init_process_group() call, Fabric makes the group"
            )
        return Group(rank=rank, store=None)
    if place.rendezvous.loopback:
        _stay_on_loopback()
    store = open_store(place.rendezvous, rank)
    # Told its device, nccl need not guess it in the first barrier.
    own = backend == place.accelerator.backend and place.device.index is not None
    dist.init_process_group(
        backend,
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timeout,
        device_id=place.device if own else None,
    )
    return Group(rank=rank, store=store)


def leave_group(group: Group, *, failed: bool) -> None:
    """Leave in order: wait shortly until all are done, then destroy.

    After a failure nothing is destroyed: other ranks are gone or stuck, and tearing a group down
    beside them may hang. The process is about to end anyway.
    """
    if group.store is None or failed or not dist.is_initialized():
        return
    if group.rank.world_size > 1:
        # A rank that left while another still reads its last message would reset the connection.
        # Bounded: a rank that is long done must not wait for one that is still working.
        with contextlib.suppress(RuntimeError):
            arrived = group.store.add("left", 1)
            if arrived == group.rank.world_size:
                group.store.set("all_left", "1")
            _wait_for(group.store, "all_left")
    dist.destroy_process_group()


def _wait_for(store: Store, key: str) -> None:
    """Look for a key for a while; the store's own waiting warns in many lines when it is over."""
    deadline = time.monotonic() + _PATIENCE
    pause = 0.001
    while not store.check([key]) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _stay_on_loopback() -> None:
    """Have gloo and NCCL listen on loopback alone, unless the user named an interface."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])
