"""One run on a cluster: places, actors, and what each of them is told."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchweft.api import RankInfo, RunPlan
from torchweft.errors import NotAvailable
from torchweft.launching import Handoff, write_error
from torchweft_ray.cluster import Cluster, Node
from torchweft_ray.crew import Crew, Member
from torchweft_ray.environment import moved, shipped
from torchweft_ray.folder import packed
from torchweft_ray.guard import Guard, Order, Site
from torchweft_ray.program import Program

if TYPE_CHECKING:
    from torchweft_ray.launcher import Ray

__all__ = ["Job"]

_LOOPBACK = "127.0.0.1"


class Job:
    """What is to run, and where it runs once there is room.

    Args:
        plan: that was made.
        asked: the launcher, for its options.
        what: every rank runs.
        call: the function and its arguments, pickled, where it runs one.
    """

    def __init__(self, plan: RunPlan, asked: Ray, what: Program, call: bytes = b"") -> None:
        self._plan = plan
        self._asked = asked
        self._what = what
        self._call = call
        self._run_id = uuid.uuid4().hex[:16]
        self._here = os.getcwd()
        topology = plan.topology
        self._per_node = topology.processes_per_node
        self._share: dict[str, float] = {"CPU": asked.cpus_per_rank}
        if plan.accelerator.device == "cuda":
            self._share["GPU"] = len(topology.devices) / self._per_node
        self._nodes: list[Node] = []
        self._sites: list[Site] = []

    # -- places ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def placed(self, cluster: Cluster) -> Iterator[list[Member]]:
        """An actor for each rank, all of them started. Raises ``NotAvailable``."""
        topology = self._plan.topology
        room = {kind: amount * self._per_node for kind, amount in self._share.items()}
        asked = (
            f"num_nodes={topology.num_nodes}, devices={len(topology.devices)}, "
            f"cpus_per_rank={self._asked.cpus_per_rank:g}"
        )
        with cluster.places(
            topology.max_nodes, room, timeout=self._asked.timeout, asked=asked
        ) as nodes:
            self._nodes = [node for node in nodes for _ in range(self._per_node)]
            actors = [cluster.actor(Guard, node, self._share) for node in self._nodes]
            self._sites = self._ask(cluster, actors)
            yield [
                Member(actor, _name(node, site))
                for actor, node, site in zip(actors, self._nodes, self._sites, strict=True)
            ]

    def _ask(self, cluster: Cluster, actors: list[Any]) -> list[Site]:
        """Where the actors are."""
        with _witness(self._here, self._run_id) as witness:
            asked = [actor.site.remote(witness, self._run_id) for actor in actors]
            sites: list[Site] = self._answers(cluster, asked, self._nodes)
        return sites

    def _answers(self, cluster: Cluster, asked: list[Any], nodes: list[Node]) -> list[Any]:
        """What actors answer. Raises ``NotAvailable``, which names the node of one that cannot."""
        answers = []
        for node, answer in zip(nodes, asked, strict=True):
            try:
                answers.append(cluster.ray.get(answer, timeout=self._asked.timeout))
            except cluster.ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                words = " ".join(str(cause).split())
                raise NotAvailable(
                    f"launcher 'ray' cannot make a rank on node {node.address}: "
                    f"{type(cause).__name__}: {words}; torchweft-ray and what the script needs are "
                    "to be installed alike on every node"
                ) from error
        return answers

    # -- ranks -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self, cluster: Cluster, members: list[Member]) -> Iterator[Crew]:
        """Every rank, running; none is left afterwards."""
        ray = cluster.ray
        script = not self._call
        with Crew(ray, members, pass_on=script, reads=script) as crew:
            self._answers(
                cluster,
                [m.actor.prepare.remote(self._run_id, rank) for rank, m in enumerate(members)],
                self._nodes,
            )
            folders = self._folders(cluster, members)
            addresses = {node.address for node in self._nodes}
            address = self._nodes[0].address if len(addresses) > 1 else _LOOPBACK
            listens = [members[0].actor.listen.remote(address)]
            (port,) = self._answers(cluster, listens, self._nodes[:1])
            call = ray.put(self._call)
            orders = [
                self._order(rank, folders[rank], cluster.address, address, port)
                for rank in range(len(members))
            ]
            starts = zip(members, orders, strict=True)
            begun = [member.actor.start.remote(order, call) for member, order in starts]
            self._answers(cluster, begun, self._nodes)
            yield crew

    def _folders(self, cluster: Cluster, members: list[Member]) -> list[str]:
        """By rank, the folder to work in: this one, or the copy that its node has."""
        wanted = self._asked.copy_folder
        copying = [
            node
            for node in range(0, len(members), self._per_node)
            if wanted or not self._sites[node].sees
        ]
        folders = [self._here] * len(members)
        if not copying:
            return folders
        names = ", ".join(members[first].node for first in copying)
        if wanted is False:
            raise NotAvailable(
                f"launcher='ray:copy_folder=false' was asked for, and node {names} does not see "
                f"the folder {self._here}; share it between all nodes, or leave copy_folder out"
            )
        write_error(
            f"torchweft: ranks on node {names} work in a copy of {self._here}, and what they write "
            "there is gone with it; write to a folder that all nodes share\n"
        )
        archive = cluster.ray.put(packed(Path(self._here), self._asked.exclude))
        unpacking = [members[first].actor.unpack.remote(archive) for first in copying]
        copies = self._answers(cluster, unpacking, [self._nodes[first] for first in copying])
        for first, copy in zip(copying, copies, strict=True):
            folders[first : first + self._per_node] = [copy] * self._per_node
        return folders

    def _order(self, rank: int, folder: str, cluster: str, address: str, port: int) -> Order:
        node, local = divmod(rank, self._per_node)
        info = RankInfo(
            rank=rank,
            world_size=len(self._sites),
            local_rank=local,
            local_world_size=self._per_node,
            node_rank=node,
            run_id=self._run_id,
        )
        # What torchweft's command said stays true in the ranks.
        outer = Handoff.read(os.environ)
        handoff = Handoff(
            run_id=self._run_id,
            launcher=self._plan.launcher.name,
            flags=dict(outer.flags) if outer else {},
            dry_run=outer is not None and outer.dry_run,
            parent=self._sites[rank].pid,
        )
        # As many as were reserved; whoever says a number is obeyed.
        environ = {"OMP_NUM_THREADS": str(max(1, int(self._asked.cpus_per_rank)))}
        environ |= shipped(os.environ)
        if "PYTHONPATH" in environ:
            entries = environ["PYTHONPATH"].split(os.pathsep)
            environ["PYTHONPATH"] = os.pathsep.join(
                moved(entry, self._here, folder) for entry in entries
            )
        environ |= {
            **info.to_environ(),
            **handoff.to_environ(),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            # So that ray.init() in a rank joins this cluster.
            "RAY_ADDRESS": cluster,
        }
        environ |= self._visible(node)
        return Order(
            program=self._what,
            environ=environ,
            here=self._here,
            there=folder,
            reads=rank == 0 and not self._call,
        )

    def _visible(self, node: int) -> dict[str, str]:
        """All GPUs of a node's ranks for each of them, as local ranks choose among them."""
        first = node * self._per_node
        sites = self._sites[first : first + self._per_node]
        devices = dict.fromkeys(device for site in sites for device in site.devices)
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}


@contextlib.contextmanager
def _witness(folder: str, words: str) -> Iterator[str]:
    """A file that only those see who see the folder; no path where it cannot be written."""
    path = Path(folder) / f".torchweft-{words}"
    try:
        path.write_text(words)
    except OSError:
        yield ""
        return
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def _name(node: Node, site: Site) -> str:
    return f"{site.host} ({node.address})"
