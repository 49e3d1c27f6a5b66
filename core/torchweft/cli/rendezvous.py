"""What was asked of a rendezvous, before nodes try to meet there."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from torchweft.errors import InvalidRequest, did_you_mean

if TYPE_CHECKING:
    from torchweft.cli.run import Job

__all__ = ["check_nodes", "pairs", "split_endpoint"]

#: What torch has; packages add theirs by entry points.
_BACKENDS = ("c10d", "etcd", "etcd-v2", "static")
_GROUP = "torchrun.handlers"

#: By backend, what it reads of ``--rdzv-conf``; of others only they know.
_NUMBERS = {
    "c10d": (
        "close_timeout",
        "heartbeat_timeout",
        "join_timeout",
        "keep_alive_interval",
        "keep_alive_max_attempt",
        "last_call_timeout",
        "read_timeout",
    ),
    "static": ("timeout",),
}
_WORDS = {
    "c10d": {"is_host": "true, false, yes, no, t, f, y, n, 1, 0", "store_type": "tcp, file"},
    "static": {},
}


def pairs(text: str | None) -> tuple[tuple[str, str], ...]:
    """The settings in ``--rdzv-conf``, by name."""
    parts = [part.partition("=") for part in text.split(",")] if text else []
    wrong = [name for name, equals, _ in parts if not (name and equals)]
    if wrong:
        raise InvalidRequest(
            f"--rdzv-conf takes 'key=value,key=value'; it was given '{text}', where '{wrong[0]}' "
            "has no value"
        )
    return tuple((name.strip(), value.strip()) for name, _, value in parts)


def check_nodes(job: Job) -> None:
    """Raise ``InvalidRequest`` where nodes could not meet by what was asked."""
    several = job.num_nodes != 1
    elastic = isinstance(job.num_nodes, tuple)
    backend = job.rdzv_backend or "static"
    _check_backend(backend)
    _check_settings(backend, job)
    if elastic and backend == "static":
        raise InvalidRequest(
            f"--num-nodes {job.flags['num_nodes']} lets nodes come and go, which the static "
            "rendezvous cannot; add --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        )
    if backend != "static" and not job.rdzv_endpoint:
        raise InvalidRequest(
            f"--rdzv-backend {backend} needs --rdzv-endpoint HOST:PORT, where the nodes meet"
        )
    if backend == "c10d":
        split_endpoint(job.rdzv_endpoint or "")
    if backend == "static" and job.rdzv_endpoint:
        raise InvalidRequest(
            f"--rdzv-endpoint {job.rdzv_endpoint} is for --rdzv-backend c10d; the static "
            "rendezvous takes --main-address and --main-port"
        )
    if several and backend == "static" and not job.main_address:
        raise InvalidRequest(
            f"--num-nodes {job.num_nodes} needs to know where the nodes meet; add --main-address "
            "HOST (the address of node 0) and --node-rank on every node"
        )
    most = job.num_nodes[1] if isinstance(job.num_nodes, tuple) else job.num_nodes
    if job.node_rank >= most:
        raise InvalidRequest(
            f"--node-rank {job.node_rank} is not one of 0 to {most - 1} (--num-nodes {most})"
        )


def _check_backend(name: str) -> None:
    if name in _BACKENDS:
        return
    known = sorted({*_BACKENDS, *(point.name for point in entry_points(group=_GROUP))})
    if name not in known:
        near = did_you_mean(name, known) or ";"
        raise InvalidRequest(
            f"torch has no rendezvous '{name}' (--rdzv-backend){near} there are "
            f"{', '.join(known)}; others come from packages with an entry point in the group "
            f"'{_GROUP}'"
        )


def split_endpoint(text: str) -> tuple[str, int | None]:
    """Host, without brackets, and port of ``HOST[:PORT]``. Raises ``InvalidRequest``."""
    host = r"(\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^:\[\]]+))"
    found = re.fullmatch(host + r"(:(?P<port>[0-9]{1,5}))?", text)
    if not found or not 0 < int(found["port"] or 1) < 65536:
        raise InvalidRequest(
            f"--rdzv-endpoint takes HOST:PORT, with a port from 1 to 65535, and [HOST]:PORT for an "
            f"address of IPv6; it was given '{text}'"
        )
    return found["ipv6"] or found["host"], int(found["port"]) if found["port"] else None


def _check_settings(backend: str, job: Job) -> None:
    if backend not in _NUMBERS:
        return
    numbers, words = _NUMBERS[backend], _WORDS[backend]
    known = sorted({*numbers, *words})
    for name, value in job.rdzv_conf:
        if name not in known:
            near = did_you_mean(name, known) or ";"
            raise InvalidRequest(
                f"the rendezvous '{backend}' has no setting '{name}' (--rdzv-conf){near} it reads "
                f"{', '.join(known)}"
            )
        if name in numbers and not (value.isdecimal() and int(value) > 0):
            raise InvalidRequest(
                f"--rdzv-conf {name}={value}: {name} is a whole number above 0, such as {name}=30"
            )
        if name in words and value.lower() not in words[name].split(", "):
            raise InvalidRequest(f"--rdzv-conf {name}={value}: {name} is one of {words[name]}")
