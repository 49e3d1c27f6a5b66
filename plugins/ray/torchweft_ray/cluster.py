"""The connection to a Ray cluster, and places for ranks on its nodes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from torchweft.errors import InvalidRequest, Misuse, NotAvailable
from torchweft.launching import in_main_thread, write_error

__all__ = ["Cluster", "Node", "connected"]

#: Seconds in which somebody has to answer where Ray is said to be. Ray itself tries for minutes.
_ANSWER = 5.0
#: Seconds after which whoever waits for places is told.
_MOMENT = 5.0

#: The variable that says what ``breakpoint()`` calls.
_DEBUGGER = "PYTHONBREAKPOINT"

_WAY_OUT = (
    "start one with 'ray start --head', set RAY_ADDRESS to HOST:PORT of one that runs, or let "
    "launcher='ray:address=local' start one on this computer for this run"
)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """Join the cluster at ``address``; a connection of the script's own is taken as it is.

    Raises ``NotAvailable`` where there is none.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raise Misuse(
                f"launcher 'ray' was given address='{address}', and the script has called "
                "ray.init() before fabric.launch(); leave one of them out"
            )
        yield Cluster(ray)
        return
    before = signal.getsignal(signal.SIGTERM)
    _init(ray, address)
    if in_main_thread():
        # Ray's own handler prints a page of addresses, and stays when the connection is gone.
        signal.signal(signal.SIGTERM, _leave if before is signal.SIG_DFL else before)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()
        if in_main_thread():
            signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _init(ray: Any, address: str | None) -> None:
    source = "launcher='ray:address=…'" if address else "RAY_ADDRESS"
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    if asked.startswith("ray://"):
        raise InvalidRequest(
            f"{source} says '{asked}', which is for Ray's client; launcher 'ray' runs on a node of "
            "the cluster: start the script there, or hand it in with 'ray job submit'"
        )
    _check(asked, source)
    debugger = os.environ.get(_DEBUGGER)
    try:
        ray.init(address=asked, log_to_driver=False, logging_level="WARNING")
    # It gives up by sending this process SIGTERM, which its own handler makes a SystemExit.
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
        told = f"{source} says '{asked}': {error}" if asked != "auto" else "none runs here"
        raise NotAvailable(f"launcher 'ray' reaches no Ray cluster ({told}); {_WAY_OUT}") from None
    finally:
        # Ray sets it to a debugger of its own, for every program that this one starts from here on.
        os.environ.pop(_DEBUGGER, None)
        if debugger is not None:
            os.environ[_DEBUGGER] = debugger


def _check(address: str, source: str) -> None:
    """Whether anybody answers there at all."""
    found = re.fullmatch(r"(?:\[(?P<six>[^\]]*)\]|(?P<host>[^:]*)):(?P<port>\d+)", address)
    if not found:
        return
    where = found["six"] or found["host"], int(found["port"])
    try:
        socket.create_connection(where, timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise NotAvailable(
            f"launcher 'ray' reaches no Ray cluster ({source} says '{address}', and nobody answers "
            f"there: {error}); {_WAY_OUT}"
        ) from None


class Node:
    """A node on which ranks have their places.

    Attributes:
        id: Ray's.
        address: by which other nodes reach it.
        bundle: index of its places in the placement group.
    """

    def __init__(self, id: str, address: str, bundle: int) -> None:
        self.id = id
        self.address = address
        self.bundle = bundle


class Cluster:
    """A cluster that this process has joined."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        self._group: Any = None

    @property
    def address(self) -> str:
        """Where others join it."""
        found: str = self.ray.get_runtime_context().gcs_address
        return found

    @contextlib.contextmanager
    def places(
        self, nodes: int, resources: Mapping[str, float], *, timeout: float, asked: str
    ) -> Iterator[list[Node]]:
        """Reserve ``resources`` on each of so many nodes, this one first if it is among them.

        Everything that runs there is ended afterwards. Raises ``NotAvailable`` where there is no
        room within ``timeout`` seconds; ``asked`` says what for.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        self._group = placement_group([dict(resources)] * nodes, strategy="STRICT_SPREAD")
        try:
            self._wait(nodes, resources, timeout, asked)
            yield self._nodes()
        finally:
            remove_placement_group(self._group)

    def _wait(self, nodes: int, resources: Mapping[str, float], timeout: float, asked: str) -> None:
        begin, told = time.monotonic(), False
        while not self._group.wait(0.25):
            waited = time.monotonic() - begin
            if waited > timeout:
                raise NotAvailable(
                    f"Ray had no room within {timeout:g} s for {_nodes(nodes)} with "
                    f"{_spell(resources)} each ({asked}); the cluster has {self._there()}; ask for "
                    "fewer devices or nodes or for less per rank (launcher='ray:cpus_per_rank=…'), "
                    "add nodes, or wait longer (launcher='ray:timeout=…')"
                )
            if waited > _MOMENT and not told:
                told = True
                write_error(
                    f"torchweft: Ray has no room yet for {_nodes(nodes)} with {_spell(resources)} "
                    f"each; waiting for up to {timeout:g} s\n"
                )

    def _there(self) -> str:
        kinds = ("CPU", "GPU")
        nodes = [
            f"{node['NodeManagerAddress']}: "
            + _spell({kind: node["Resources"].get(kind, 0) for kind in kinds})
            for node in self.ray.nodes()
            if node["Alive"]
        ]
        free = self.ray.available_resources()
        unused = _spell({kind: free.get(kind, 0) for kind in kinds})
        return f"{_nodes(len(nodes))} ({'; '.join(nodes)}), of which {unused} are free"

    def _nodes(self) -> list[Node]:
        from ray.util.placement_group import placement_group_table

        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self.ray.nodes()}
        bundles = placement_group_table(self._group)["bundles_to_node_id"]
        here = self.ray.get_runtime_context().get_node_id()
        found = [Node(id, addresses[id], bundle) for bundle, id in bundles.items()]
        return sorted(found, key=lambda node: (node.id != here, node.bundle))

    def actor(self, kind: type, node: Node, resources: Mapping[str, float]) -> Any:
        """An actor in one of the places on a node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=node.bundle
        )
        made = self.ray.remote(kind).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=place,
            max_restarts=0,
        )
        return made.remote()


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def _spell(resources: Mapping[str, float]) -> str:
    said = [f"{amount:g} {kind}" for kind, amount in resources.items() if amount]
    return " and ".join(said) or "nothing"
