from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import InvalidRequest
from torchweft.rank import RankInfo, Rendezvous

ENVIRON = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "4",
}
WAY_OUT = (
    "unset the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, …) "
    "if this process is no rank of such a run"
)


def test_torchruns_variables_are_read() -> None:
    assert RankInfo.from_environ(ENVIRON) == RankInfo(
        rank=3,
        world_size=8,
        local_rank=1,
        local_world_size=2,
        node_rank=1,
        run_id="run",
        restart=4,
    )


def test_what_torchrun_may_leave_out() -> None:
    least = {name: ENVIRON[name] for name in list(ENVIRON)[:4]}
    info = RankInfo.from_environ(least)
    assert (info.node_rank, info.run_id, info.restart) == (0, "", 0)
    assert RankInfo.from_environ({**least, "NODE_RANK": "2"}).node_rank == 2
    assert RankInfo.from_environ({**least, "GROUP_RANK": "1", "NODE_RANK": "x"}).node_rank == 1


@pytest.mark.parametrize("name", list(ENVIRON)[:4])
def test_a_missing_variable_is_named(name: str) -> None:
    environ = {key: value for key, value in ENVIRON.items() if key != name}
    with pytest.raises(InvalidRequest) as caught:
        RankInfo.from_environ(environ)
    assert str(caught.value) == (
        "this process was started as a rank of a distributed run, but the environment variable "
        f"{name} is not set; it takes a number from 0; {WAY_OUT}"
    )


@pytest.mark.parametrize("name", [n for n in ENVIRON if n != "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0", " 1", "0x1"])
def test_a_value_that_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name} is '{value}'; it takes a number from 0"):
        RankInfo.from_environ({**ENVIRON, name: value})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "8"}, "RANK is 8, and WORLD_SIZE is 8; ranks count from 0, so that RANK is less"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, and LOCAL_WORLD_SIZE is 2; ranks count from 0"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is 0, and WORLD_SIZE is 0"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE is 9, which is more than WORLD_SIZE, 8"),
    ],
)
def test_variables_of_different_runs_are_an_error(environ: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RankInfo.from_environ({**ENVIRON, **environ})
    assert f"the environment variable {words}" in str(caught.value)
    assert str(caught.value).endswith(WAY_OUT)


@st.composite
def infos(draw: st.DrawFn) -> RankInfo:
    world = draw(st.integers(1, 10_000))
    local = draw(st.integers(1, world))
    return RankInfo(
        rank=draw(st.integers(0, world - 1)),
        world_size=world,
        local_rank=draw(st.integers(0, local - 1)),
        local_world_size=local,
        node_rank=draw(st.integers(0, 100)),
        run_id=draw(st.text(max_size=8)),
        restart=draw(st.integers(0, 9)),
    )


@given(infos())
def test_what_is_written_is_read_back(info: RankInfo) -> None:
    assert RankInfo.from_environ(info.to_environ()) == info
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_a_run_that_cannot_leave_its_node(address: str) -> None:
    assert Rendezvous(address=address).loopback


@pytest.mark.parametrize("address", ["10.0.0.1", "node-127.example", "example.org", "::2"])
def test_a_run_that_can(address: str) -> None:
    assert not Rendezvous(address=address).loopback
