"""Where several launchers would apply the order is fixed, and a plan shows it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.core.test_kubeflow import PYTORCH_JOB
from tests.core.test_lsf import JSRUN
from tests.core.test_mpi import OPEN_MPI_4

from torchweft.catalog import Catalog
from torchweft.errors import IncompatiblePlan
from torchweft.manager import Manager
from torchweft.request import RunRequest
from torchweft.resolve import resolve

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "a",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def decided(*environs: dict[str, str], **asked: Any) -> tuple[str, dict[str, str]]:
    """The launcher, and what the plan says of the others that answered."""
    environ = {name: value for each in environs for name, value in each.items()}
    catalog = Catalog(Manager.from_entry_points({}).declared)
    request = RunRequest.parse(accelerator="cpu", strategy="ddp")
    plan = resolve(
        request.with_environment({**environ, **asked}, catalog), catalog, environ=environ
    )
    decision = plan.decisions[3]
    return plan.launcher.name, {other.name: other.reason for other in decision.rejected}


@pytest.mark.parametrize(
    ("environs", "launcher", "others"),
    [
        ([OPEN_MPI_4, TORCHRUN], "torchrun", {"mpi": "mpirun started this process too, but "
                                              "'torchrun' is nearer to it: priority 200 over 180"}),
        ([PYTORCH_JOB, JSRUN, OPEN_MPI_4], "mpi", {
            "lsf": "jsrun started this process too, but 'mpi' is nearer to it: priority 180 over "
            "170",
            "kubeflow": "Kubeflow started this process too, but 'mpi' is nearer to it: priority "
            "180 over 150",
        }),
        ([PYTORCH_JOB, JSRUN], "lsf", {
            "kubeflow": "Kubeflow started this process too, but 'lsf' is nearer to it: priority "
            "170 over 150",
        }),
        ([PYTORCH_JOB], "kubeflow", {}),
    ],
)  # fmt: skip
def test_the_nearer_to_the_process_wins(
    environs: list[dict[str, str]], launcher: str, others: dict[str, str]
) -> None:
    assert decided(*environs) == (launcher, others)


def test_another_of_them_may_be_asked_for() -> None:
    assert decided(PYTORCH_JOB, OPEN_MPI_4, TORCHWEFT_LAUNCHER="kubeflow") == (
        "kubeflow",
        {"mpi": "mpirun started this process too, but 'kubeflow' was asked for"},
    )


def test_none_but_those() -> None:
    with pytest.raises(
        IncompatiblePlan,
        match=r"^launcher 'lsf' \(TORCHWEFT_LAUNCHER\) was asked for, but mpirun started this "
        r"process; leave launcher out, or start the script with python$",
    ):
        decided(OPEN_MPI_4, TORCHWEFT_LAUNCHER="lsf")


def test_what_is_wrong_further_out_stops_nobody() -> None:
    dealt = {**OPEN_MPI_4, "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert decided(dealt, TORCHRUN) == ("torchrun", {})
