"""What is here needs torchweft-ray, and most of it a Ray cluster, which is started once."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

if find_spec("torchweft_ray") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with two processors each, all on this computer.

    Ray listens on this computer's own address: drivers that are given a loopback address look for
    the cluster there all the same.
    """
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        for _ in range(2):
            made.add_node(num_cpus=2, object_store_memory=100 << 20)
        yield made.address
    finally:
        made.shutdown()
