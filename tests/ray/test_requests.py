"""What is declared, found in a rank's environment, and refused in a plan."""

from __future__ import annotations

import os

import pytest

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan
from torchweft.launching import Handoff
from torchweft.testing.interpreter import fresh_interpreter
from torchweft_ray.detect import made
from torchweft_ray.hooks import torchweft_launchers
from torchweft_ray.probe import ray


def test_it_is_never_picked_by_itself() -> None:
    (spec,) = torchweft_launchers()
    assert (spec.name, spec.priority, spec.nodes) == ("ray", None, "any")
    assert ray().ok


@pytest.mark.parametrize("launcher", ["ray", "script"])
def test_a_rank_is_known_by_who_made_it(launcher: str) -> None:
    handoff = Handoff(run_id="a", launcher=launcher, pid=os.getpid())
    environ = {**handoff.to_environ(), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    found = made(environ)
    if launcher != "ray":
        assert found is None
        return
    assert found is not None
    assert (found.world_size, found.processes_per_node) == (4, 2)
    # What a rank starts inherits its environment, and is none.
    stale = Handoff(run_id="a", launcher="ray", pid=os.getpid() + 1)
    assert made({**environ, **stale.to_environ()}) is None


def test_an_elastic_run_is_refused() -> None:
    with pytest.raises(IncompatiblePlan, match=r"num_nodes='1:2' lets them come and go; write one"):
        Fabric(accelerator="cpu", devices=2, num_nodes="1:2", launcher="ray")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ["guard", "launcher", "rank"])
def test_what_is_imported(module: str) -> None:
    """Ray at launch alone; no torch where a rank begins, nor in an actor."""
    done = fresh_interpreter(f"import torchweft_ray.{module}", timeout=60)
    assert done.status == 0, done.err
    assert "ray" not in done.loaded
    assert ("torch" in done.loaded) == (module == "launcher")
