"""Sizes of the dimensions in which ``fsdp`` arranges processes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft import Fabric
from torchweft.errors import IncompatiblePlan, InvalidRequest, RankFailed
from torchweft.testing import run_ranks
from torchweft_cuda.fsdp import FSDPStrategy
from torchweft_cuda.mesh import Sizes, sizes_for


def told(processes, **given):
    return sizes_for(processes, **{"replicate": None, "shard": None, "tensor": None, **given})


@pytest.mark.parametrize(
    ("processes", "given", "names", "shape"),
    [
        (1, {}, ("shard",), (1,)),
        (4, {}, ("shard",), (4,)),
        (4, {"tensor": 1}, ("shard",), (4,)),
        (4, {"replicate": 2}, ("replicate", "shard"), (2, 2)),
        (4, {"shard": 2}, ("replicate", "shard"), (2, 2)),
        (4, {"shard": 4}, ("shard",), (4,)),
        (4, {"replicate": 4}, ("replicate", "shard"), (4, 1)),
        (2, {"tensor": 2}, ("shard", "tensor"), (1, 2)),
        (8, {"tensor": 2, "replicate": 2}, ("replicate", "shard", "tensor"), (2, 2, 2)),
        (8, {"tensor": 2, "shard": 2}, ("replicate", "shard", "tensor"), (2, 2, 2)),
        (8, {"tensor": 4, "replicate": 1, "shard": 2}, ("shard", "tensor"), (2, 4)),
    ],
)
def test_what_is_left_open_takes_what_is_left(processes, given, names, shape):
    sizes = told(processes, **given)
    assert (sizes.names, sizes.shape) == (names, shape)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.sampled_from(["all", "one"]))
def test_sizes_multiply_to_the_processes(replicate, shard, tensor, how):
    asked = {"replicate": replicate, "shard": shard, "tensor": tensor}
    if how == "one":
        del asked["shard"]
    sizes = told(replicate * shard * tensor, **asked)
    assert sizes == Sizes(replicate=replicate, shard=shard, tensor=tensor)


@pytest.mark.parametrize(
    ("processes", "given", "words"),
    [
        (
            4,
            {"replicate": 3},
            (
                "replicate=3, and the 4 processes of the run cannot be divided into 3 equal parts; "
                "write replicate=1, 2 or 4"
            ),
        ),
        (
            1,
            {"tensor": 2},
            (
                "tensor=2, and the 1 process of the run cannot be divided into 2 equal parts; "
                "write tensor=1"
            ),
        ),
        (
            8,
            {"replicate": 2, "tensor": 3},
            (
                "replicate=2, tensor=3, which multiply to 6, and the run has 8 processes; choose "
                "sizes that multiply to 1, 2, 4 or 8"
            ),
        ),
        (
            8,
            {"replicate": 2, "shard": 2},
            (
                "replicate=2, shard=2, which multiply to 4, and the run has 8 processes; choose "
                "sizes that multiply to 8 (each is one of 1, 2, 4 or 8), or leave out replicate "
                "or shard"
            ),
        ),
    ],
)
def test_sizes_that_do_not_fit(processes, given, words):
    with pytest.raises(InvalidRequest) as refused:
        told(processes, **given)
    assert str(refused.value) == f"strategy 'fsdp' was given {words}"


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("replicate", "copies of the model"),
        ("shard", "the processes between which a copy is split"),
        ("tensor", "the processes that compute a layer together"),
    ],
)
def test_a_size_below_one(name, counted):
    with pytest.raises(InvalidRequest) as refused:
        told(4, **{name: 0})
    assert str(refused.value) == f"strategy 'fsdp' was given {name}=0; it counts {counted}, from 1"


@pytest.mark.parametrize(
    ("processes", "reshard", "words"),
    [(4, 3, "4 processes; write true, false, 2"), (1, 2, "1 process; write true, false")],
)
def test_a_number_of_processes_that_a_copy_cannot_be_split_between(processes, reshard, words):
    with pytest.raises(IncompatiblePlan) as refused:
        Fabric(
            accelerator="cpu", devices=processes, strategy=f"fsdp:reshard_after_forward={reshard}"
        )
    assert str(refused.value).startswith(
        f"strategy 'fsdp' was given reshard_after_forward={reshard}, and a copy of the model is "
        f"split between {words}"
    )
    with pytest.raises(RankFailed, match=f"split between {words}"):
        run_ranks(processes, print, strategy=FSDPStrategy(reshard_after_forward=reshard))


def test_the_plan_is_refused_before_a_process_starts():
    with pytest.raises(IncompatiblePlan) as refused:
        Fabric(accelerator="cpu", devices=4, strategy="fsdp:tensor=3")
    assert str(refused.value).startswith(
        "strategy 'fsdp' was given tensor=3, and the 4 processes of the run cannot be divided into "
        "3 equal parts; write tensor=1, 2 or 4"
    )
    Fabric(accelerator="cpu", devices=4, strategy="fsdp:tensor=2")
