from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import InvalidRequest
from torchweft.handoff import VARIABLE, Handoff
from torchweft.request import RunRequest, parse_devices, parse_name, parse_num_nodes

if TYPE_CHECKING:
    from tests.core.conftest import World


# -- names and options -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "auto", " Auto ", "AUTO"])
def test_a_choice_left_open(value: Any) -> None:
    assert parse_name("strategy", value) == (None, {})


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("ddp", ("ddp", {})),
        (" DDP ", ("ddp", {})),
        ("ddp:static_graph=true", ("ddp", {"static_graph": True})),
        (
            "ddp: a = False , b=NONE,c=25,d=-1.5,e=1e3,f=nccl,g=x=y",
            (
                "ddp",
                {"a": False, "b": None, "c": 25, "d": -1.5, "e": 1000.0, "f": "nccl", "g": "x=y"},
            ),
        ),
        ("ddp:a='25',b=\"true\",c='',d='", ("ddp", {"a": "25", "b": "true", "c": "", "d": "'"})),
    ],
)
def test_a_name_with_options(value: str, parsed: tuple[str, dict[str, Any]]) -> None:
    name, options = parse_name("strategy", value)
    assert (name, options) == parsed
    assert {key: type(option) for key, option in options.items()} == {
        key: type(option) for key, option in parsed[1].items()
    }


@pytest.mark.parametrize("value", [16, numpy.int64(16), "16"])
def test_a_precision_may_be_a_number(value: Any) -> None:
    assert parse_name("precision", value) == ("16", {})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "strategy='' names nothing; it takes a name or 'auto'"),
        (":a=1", "strategy=':a=1' names nothing"),
        (7, "strategy=7 is of type int; it takes a name, or an instance of a strategy class"),
        (True, "strategy=True is of type bool"),
        (["ddp"], "strategy=['ddp'] is of type list"),
        ("ddp:", "strategy='ddp:' has '' where an option belongs; write strategy='name:option="),
        ("ddp:static_graph", "has 'static_graph' where an option belongs"),
        ("ddp:a=1,,b=2", "has '' where an option belongs"),
        ("ddp:static-graph=true", "has 'static-graph=true' where an option belongs"),
        ("ddp:=1", "has '=1' where an option belongs"),
        ("ddp:a=1,a=2", "strategy='ddp:a=1,a=2' gives the option 'a' twice"),
        ("auto:a=1", "strategy='auto:a=1' gives options to a strategy that is not named"),
    ],
)
def test_what_is_no_name(value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_name("strategy", value)
    assert words in str(caught.value)


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.one_of(
    st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False), st.just("nccl")
)


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_options_are_read_as_they_are_written(options: dict[str, Any]) -> None:
    written = ",".join(f"{key}={value}" for key, value in options.items())
    name, parsed = parse_name("strategy", f"ddp:{written}")
    assert (name, parsed) == ("ddp", options)
    assert [type(value) for value in parsed.values()] == [type(v) for v in options.values()]


@given(st.text())
def test_no_name_ends_in_another_error(text: str) -> None:
    try:
        name, options = parse_name("strategy", text)
    except InvalidRequest:
        return
    assert name is None or (name == name.strip().lower() != "auto" and ":" not in name)
    assert all(key.isidentifier() for key in options)


# -- devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        (None, None),
        ("auto", None),
        (" AUTO ", None),
        ("all", "all"),
        (-1, "all"),
        ("-1", "all"),
        (2, 2),
        ("2", 2),
        (" +2 ", 2),
        (numpy.int64(2), 2),
        ("1,", (1,)),
        ("0,2", (0, 2)),
        (" 2 , 0 , ", (2, 0)),
        ([0, 2], (0, 2)),
        ((3,), (3,)),
        (range(1, 3), (1, 2)),
        ([numpy.int32(1)], (1,)),
    ],
)
def test_devices(value: Any, devices: Any) -> None:
    parsed = parse_devices(value)
    assert parsed == devices
    assert type(parsed) is type(devices)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            0,
            (
                "devices=0 asks for 0 devices; it takes 1 or more, or -1 ('all') for all that "
                "an accelerator counts"
            ),
        ),
        ("0", "devices='0' asks for 0 devices; it takes 1 or more"),
        (-2, "devices=-2 asks for -2 devices; it takes 1 or more"),
        ("-3", "devices='-3' asks for -3 devices"),
        (
            [0, 0],
            "devices=[0, 0] names device 0 more than once; each process needs a device of its own",
        ),
        ("1,2,1", "devices='1,2,1' names device 1 more than once"),
        ([0, -1], "devices=[0, -1] has the negative index -1; indices count from 0"),
        ("-1,", "devices='-1,' has the negative index -1"),
        ([], "devices=[] is not a list of device indices, such as [0, 2]"),
        ([True], "devices=[True] is not a list of device indices"),
        (["0"], "devices=['0'] is not a list of device indices"),
        ([0.0], "devices=[0.0] is not a list of device indices"),
        (
            "",
            (
                "devices='' is not understood; it takes a number of devices, 'auto', 'all', or a "
                "list of indices such as [0, 2] or '0,2'"
            ),
        ),
        (",", "devices=',' is not understood"),
        ("1,,2", "devices='1,,2' is not understood"),
        ("1,-", "devices='1,-' is not understood"),
        ("1 2", "devices='1 2' is not understood"),
        ("0-3", "devices='0-3' is not understood"),
        ("two", "devices='two' is not understood"),
        ("1.0", "devices='1.0' is not understood"),
        (1.0, "devices=1.0 is not understood"),
        (True, "devices=True is not understood"),
        ({0, 1}, "devices={0, 1} is not understood"),
        (b"12", "devices=b'12' is not understood"),
        (numpy.array([0, 1]), "devices=array([0, 1]) is not understood"),
    ],
)
def test_what_are_no_devices(value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_devices(value)
    assert str(caught.value).startswith(words)


@given(st.integers())
def test_a_count_means_the_same_as_number_and_as_text(count: int) -> None:
    assert _outcome(parse_devices, count) == _outcome(parse_devices, str(count))


@given(st.lists(st.integers(-2, 9), max_size=5))
def test_indices_mean_the_same_as_list_and_as_text(indices: list[int]) -> None:
    text = ",".join(map(str, indices)) + ","
    assert _outcome(parse_devices, indices) == _outcome(parse_devices, text)
    good = indices and min(indices) >= 0 and len(set(indices)) == len(indices)
    assert _outcome(parse_devices, indices) == (tuple(indices) if good else InvalidRequest)


@given(st.one_of(st.text(), st.text(alphabet="0123456789,+- "), st.lists(st.none())))
def test_no_devices_end_in_another_error(value: Any) -> None:
    devices = _outcome(parse_devices, value)
    assert devices in (None, "all", InvalidRequest) or isinstance(devices, int | tuple)


def _outcome(parse: Any, value: Any) -> Any:
    try:
        return parse(value)
    except InvalidRequest:
        return InvalidRequest


# -- nodes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "nodes"),
    [
        (None, None),
        ("auto", None),
        (2, 2),
        ("2", 2),
        ("1:4", (1, 4)),
        (" 1 : 4 ", (1, 4)),
        ((1, 4), (1, 4)),
        ([1, 4], (1, 4)),
        ("3:3", 3),
        (numpy.int64(2), 2),
    ],
)
def test_num_nodes(value: Any, nodes: Any) -> None:
    assert parse_num_nodes(value) == nodes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "num_nodes=0 is impossible; it takes 1 or more"),
        ("-1", "num_nodes='-1' is impossible; it takes 1 or more"),
        ("0:2", "num_nodes='0:2' is impossible; it takes 1 or more, the least number first"),
        ((4, 1), "num_nodes=(4, 1) is impossible; it takes 1 or more, the least number first"),
        (
            "",
            (
                "num_nodes='' is not understood; it takes a number of nodes, 'auto', or "
                "'least:most' for an elastic run"
            ),
        ),
        ("1:", "num_nodes='1:' is not understood"),
        ("1:2:3", "num_nodes='1:2:3' is not understood"),
        ("two", "num_nodes='two' is not understood"),
        (True, "num_nodes=True is not understood"),
        ((True, 2), "num_nodes=(True, 2) is not understood"),
        ((1,), "num_nodes=(1,) is not understood"),
        (1.0, "num_nodes=1.0 is not understood"),
    ],
)
def test_what_is_no_number_of_nodes(value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_num_nodes(value)
    assert str(caught.value).startswith(words)


@given(st.integers(-2, 5), st.integers(-2, 5))
def test_least_and_most(least: int, most: int) -> None:
    outcome = _outcome(parse_num_nodes, f"{least}:{most}")
    assert outcome == _outcome(parse_num_nodes, (least, most))
    if 1 <= least <= most:
        assert outcome == ((least, most) if least < most else least)
    else:
        assert outcome is InvalidRequest


@given(st.one_of(st.text(), st.text(alphabet="0123456789:+- ")))
def test_no_number_of_nodes_ends_in_another_error(value: str) -> None:
    nodes = _outcome(parse_num_nodes, value)
    assert nodes in (None, InvalidRequest) or isinstance(nodes, int | tuple)


# -- the whole ---------------------------------------------------------------------------------


def test_a_request() -> None:
    request = RunRequest.parse(
        accelerator="GPU",
        devices="0,2",
        num_nodes="1:2",
        strategy="ddp:static_graph=true",
        precision=16,
        launcher="fork",
    )
    assert request == RunRequest(
        accelerator="gpu",
        devices=(0, 2),
        num_nodes=(1, 2),
        strategy="ddp",
        precision="16",
        launcher="fork",
        options={"strategy": {"static_graph": True}},
    )
    assert RunRequest.parse() == RunRequest.parse(devices="auto", strategy="auto") == RunRequest()


def test_a_word_that_is_no_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="acelerator"):
        RunRequest.parse(acelerator="cpu")  # type: ignore[call-arg]


# -- the environment ---------------------------------------------------------------------------


def flags(**given: Any) -> dict[str, str]:
    """The environment of a rank of ``torchweft run`` with these flags."""
    return Handoff(run_id="run", flags=given, pid=os.getpid()).to_environ()


def merged(world: World, script: dict[str, Any], given: dict[str, Any]) -> RunRequest:
    return RunRequest.parse(**script).with_environment(flags(**given), world.catalog)


def test_without_an_environment_a_request_stays_as_it_is() -> None:
    request = RunRequest.parse(devices=2)
    assert request.with_environment({}) == request
    assert request.with_environment(flags()) == request


def test_flags_fill_in_what_the_script_left_open(world: World) -> None:
    request = merged(
        world,
        {"strategy": "ddp", "devices": "auto"},
        {"devices": "2", "precision": "bf16-mixed", "num_nodes": [1, 2]},
    )
    assert request == RunRequest.parse(
        strategy="ddp", devices=2, precision="bf16-mixed", num_nodes=(1, 2)
    )
    assert request.sources == {
        "devices": "--devices",
        "precision": "--precision",
        "num_nodes": "--num-nodes",
    }


@pytest.mark.parametrize(
    ("script", "given", "result"),
    [
        ({"devices": 2}, {"devices": "2"}, {"devices": 2}),
        ({"devices": [0, 1]}, {"devices": "0,1"}, {"devices": [0, 1]}),
        ({"devices": -1}, {"devices": "all"}, {"devices": -1}),
        ({"devices": 2}, {"devices": "auto"}, {"devices": 2}),
        ({"num_nodes": 2}, {"num_nodes": "2:2"}, {"num_nodes": 2}),
        ({"accelerator": "CUDA"}, {"accelerator": "cuda"}, {"accelerator": "cuda"}),
        # An alias of two accelerators and one of them: the one is meant.
        ({"accelerator": "gpu"}, {"accelerator": "cuda"}, {"accelerator": "cuda"}),
        ({"accelerator": "cuda"}, {"accelerator": "gpu"}, {"accelerator": "cuda"}),
        ({"accelerator": "gpu"}, {"accelerator": "mps"}, {"accelerator": "mps"}),
        ({"precision": 32}, {"precision": "32-true"}, {"precision": "32"}),
        (
            {"strategy": "ddp:static_graph=true"},
            {"strategy": "ddp:static_graph=True"},
            {"strategy": "ddp:static_graph=true"},
        ),
        (
            {"strategy": "ddp_find_unused_parameters_true"},
            {"strategy": "ddp:find_unused_parameters=true"},
            {"strategy": "ddp_find_unused_parameters_true"},
        ),
        (
            {"strategy": "ddp_find_unused_parameters_true"},
            {"strategy": "ddp_find_unused_parameters_true:find_unused_parameters=true"},
            {"strategy": "ddp_find_unused_parameters_true"},
        ),
    ],
)
def test_what_means_the_same_agrees(
    world: World, script: dict[str, Any], given: dict[str, Any], result: dict[str, Any]
) -> None:
    assert merged(world, script, given) == RunRequest.parse(**result)


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        (
            {"devices": 4},
            {"devices": "2"},
            (
                "--devices says 2 and the script says Fabric(devices=4); leave one of them out, or "
                "make them equal"
            ),
        ),
        (
            {"devices": [0, 1]},
            {"devices": "2"},
            "--devices says 2 and the script says Fabric(devices=[0, 1]);",
        ),
        (
            {"num_nodes": 2},
            {"num_nodes": "1:2"},
            "--num-nodes says (1, 2) and the script says Fabric(num_nodes=2);",
        ),
        (
            {"accelerator": "cpu"},
            {"accelerator": "gpu"},
            "--accelerator says 'gpu' and the script says Fabric(accelerator='cpu');",
        ),
        (
            {"accelerator": "mps"},
            {"accelerator": "cuda"},
            "--accelerator says 'cuda' and the script says Fabric(accelerator='mps');",
        ),
        (
            {"strategy": "ddp"},
            {"strategy": "ddp:static_graph=true"},
            "--strategy says 'ddp:static_graph=True' and the script says Fabric(strategy='ddp');",
        ),
        (
            {"strategy": "ddp_spawn"},
            {"strategy": "ddp"},
            "--strategy says 'ddp' and the script says Fabric(strategy='ddp_spawn');",
        ),
        (
            {"precision": "bf16"},
            {"precision": "16-mixed"},
            "--precision says '16-mixed' and the script says Fabric(precision='bf16');",
        ),
        (
            {"strategy": "nobody"},
            {"strategy": "nobody_else"},
            "--strategy says 'nobody_else' and the script says Fabric(strategy='nobody');",
        ),
    ],
)
def test_a_flag_and_an_argument_that_disagree(
    world: World, script: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        merged(world, script, given)
    assert str(caught.value).startswith(words)


def test_without_a_catalog_names_agree_by_their_letters() -> None:
    script = RunRequest.parse(accelerator="cuda")
    assert script.with_environment(flags(accelerator="cuda")) == script
    with pytest.raises(InvalidRequest, match="--accelerator says 'gpu'"):
        script.with_environment(flags(accelerator="gpu"))


def test_flags_of_another_run_change_nothing() -> None:
    stale = Handoff(run_id="old", flags={"devices": "8"}, pid=1).to_environ()
    assert RunRequest.parse(devices=2).with_environment(stale) == RunRequest.parse(devices=2)


def test_a_flag_that_is_never_handed_on() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^the environment variable TORCHWEFT_RUN holds the flag 'colour', which "
        r"'torchweft run' does not hand on; unset TORCHWEFT_RUN$",
    ):
        RunRequest().with_environment(flags(colour="red", devices="2"))


def test_a_stale_run_variable_that_cannot_be_read() -> None:
    with pytest.raises(
        InvalidRequest, match=r"TORCHWEFT_RUN is 'yes', which 'torchweft run' never"
    ):
        RunRequest().with_environment({VARIABLE: "yes"})


# -- TORCHWEFT_LAUNCHER ------------------------------------------------------------------------


def test_the_variable_chooses_a_launcher() -> None:
    request = RunRequest.parse(devices=2).with_environment({"TORCHWEFT_LAUNCHER": "Fork"})
    assert request == RunRequest.parse(devices=2, launcher="fork")
    assert request.sources == {"launcher": "TORCHWEFT_LAUNCHER"}


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_variable_may_leave_it_open(value: str) -> None:
    assert RunRequest().with_environment({"TORCHWEFT_LAUNCHER": value}) == RunRequest()


def test_the_variable_and_the_script_may_agree() -> None:
    script = RunRequest.parse(launcher="fork")
    assert script.with_environment({"TORCHWEFT_LAUNCHER": "fork"}) == script


def test_the_variable_and_the_script_disagree() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^TORCHWEFT_LAUNCHER says 'fork' and the script says Fabric\(launcher='spawn'\); "
        r"leave one of them out, or make them equal$",
    ):
        RunRequest.parse(launcher="spawn").with_environment({"TORCHWEFT_LAUNCHER": "fork"})


def test_the_variable_and_a_flag_disagree() -> None:
    environ = {**flags(launcher="spawn"), "TORCHWEFT_LAUNCHER": "fork"}
    with pytest.raises(
        InvalidRequest, match=r"^TORCHWEFT_LAUNCHER says 'fork' and --launcher says 'spawn'; "
    ):
        RunRequest().with_environment(environ)


def test_a_value_of_the_variable_that_cannot_be_used() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^the environment variable TORCHWEFT_LAUNCHER: launcher=':' names nothing; "
        r"it takes a name or 'auto'$",
    ):
        RunRequest().with_environment({"TORCHWEFT_LAUNCHER": ":"})
