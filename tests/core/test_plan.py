from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from torchweft.plan import Decision, Rejected, RunPlan, Topology
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

CPU = AcceleratorSpec(name="cpu", target="a:B", device="cpu")
DDP = StrategySpec(name="ddp", target="a:B")
FULL = PrecisionSpec(name="32-true", target="a:B")
SCRIPT = LauncherSpec(name="script", target="a:B")

PLAN = RunPlan(
    accelerator=CPU,
    strategy=DDP,
    precision=FULL,
    launcher=SCRIPT,
    topology=Topology(num_nodes=1, processes_per_node=2, devices=(0, 1)),
    options={"strategy": {"static_graph": True, "bucket_cap_mb": 25}},
    decisions=(
        Decision(
            kind="accelerator",
            wanted="auto",
            spec=CPU,
            provider="torchweft 0.1.0",
            why="the only one that can be used",
            rejected=(
                Rejected(
                    name="cuda",
                    provider="torchweft-cuda 0.1.0",
                    reason="no driver",
                    hint="install one",
                ),
            ),
        ),
        Decision(
            kind="strategy", wanted="ddp", spec=DDP, provider="torchweft-cuda 0.1.0", why="named"
        ),
    ),
    notes=("plugin 'acme' (torchweft-acme 0.1) failed to load: OSError: x",),
)


def test_a_plan_is_plain_data() -> None:
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN
    assert hash(PLAN) == hash(replace(PLAN))
    assert replace(PLAN, options={}) != PLAN


def test_what_was_decided_and_why() -> None:
    assert PLAN.explain().splitlines() == [
        "accelerator cpu  (torchweft 0.1.0; asked for: auto; the only one that can be used)",
        "              not 'cuda' (torchweft-cuda 0.1.0): no driver; install one",
        "strategy    ddp  (torchweft-cuda 0.1.0; asked for: ddp; named)",
        "              with static_graph=True, bucket_cap_mb=25",
        "processes   2  (2 on this node, devices 0, 1)",
        "note        plugin 'acme' (torchweft-acme 0.1) failed to load: OSError: x",
    ]


@pytest.mark.parametrize(
    ("nodes", "summary", "processes"),
    [
        (1, "ddp on 2 x cpu, 32-true, launched by script", "2  (2 on this node, devices 0, 1)"),
        (
            3,
            "ddp on 2 x cpu on each of 3 nodes, 32-true, launched by script",
            "6  (2 on each of 3 nodes, devices 0, 1)",
        ),
        (
            (1, 4),
            "ddp on 2 x cpu on each of 1 to 4 nodes, 32-true, launched by script",
            "at most 8  (2 on each of 1 to 4 nodes, devices 0, 1)",
        ),
    ],
)
def test_how_many_nodes(nodes: int | tuple[int, int], summary: str, processes: str) -> None:
    plan = replace(PLAN, topology=replace(PLAN.topology, num_nodes=nodes))
    assert plan.summary() == summary
    assert f"processes   {processes}" in plan.explain().splitlines()


@pytest.mark.parametrize(
    ("topology", "most", "world"),
    [
        (Topology(), 1, 1),
        (Topology(num_nodes=2, processes_per_node=4), 2, 8),
        (Topology(num_nodes=(1, 3), processes_per_node=2), 3, 6),
    ],
)
def test_how_many_processes(topology: Topology, most: int, world: int) -> None:
    assert (topology.max_nodes, topology.world_size) == (most, world)


def test_a_rejection_without_a_hint() -> None:
    rejected = Rejected(name="fork", provider="torchweft 0.1.0", reason="no fork here")
    assert rejected.sentence() == "'fork' (torchweft 0.1.0): no fork here"
