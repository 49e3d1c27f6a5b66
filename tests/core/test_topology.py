from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.errors import InvalidRequest, NotAvailable, TorchweftError
from torchweft.plan import Topology
from torchweft.request import RunRequest
from torchweft.specs import AcceleratorSpec, Detection, StrategySpec
from torchweft.topology import Site

CPU = AcceleratorSpec(name="cpu", target="a:B", device="cpu", selectable=False)
CUDA = AcceleratorSpec(name="cuda", target="a:B", device="cuda", default_devices="all")


def strategy(processes: Literal["device", "node", "one"] = "device") -> StrategySpec:
    return StrategySpec(name="acme", target="a:B", processes=processes)


def site(
    accelerator: AcceleratorSpec = CPU,
    count: int | None = None,
    detection: Detection | None = None,
    **asked: Any,
) -> Site:
    return Site(
        request=RunRequest.parse(**asked),
        accelerator=accelerator,
        count=count,
        detection=detection,
    )


def torchrun(world_size: int | None, per_node: int | None) -> Detection:
    return Detection(
        reason="torchrun started this process",
        world_size=world_size,
        processes_per_node=per_node,
    )


@pytest.mark.parametrize(
    ("asked", "topology"),
    [
        ({}, Topology(devices=(0,))),
        ({"devices": 3}, Topology(processes_per_node=3, devices=(0, 1, 2))),
        ({"num_nodes": 2}, Topology(num_nodes=2, devices=(0,))),
        (
            {"devices": 2, "num_nodes": "1:4"},
            Topology(num_nodes=(1, 4), processes_per_node=2, devices=(0, 1)),
        ),
    ],
)
def test_devices_without_a_limit(asked: dict[str, Any], topology: Topology) -> None:
    assert site(**asked).topology(strategy(), named=False) == topology


@pytest.mark.parametrize(
    ("devices", "indices"),
    [(None, (0, 1, 2, 3)), ("all", (0, 1, 2, 3)), (2, (0, 1)), ([3, 1], (3, 1)), (4, (0, 1, 2, 3))],
)
def test_devices_that_are_counted(devices: Any, indices: tuple[int, ...]) -> None:
    found = site(CUDA, 4, devices=devices).topology(strategy(), named=False)
    assert (found.devices, found.processes_per_node) == (indices, len(indices))


def test_a_strategy_of_one_process_a_node_takes_all_devices() -> None:
    found = site(CUDA, 4).topology(strategy("node"), named=True)
    assert (found.processes_per_node, found.devices) == (1, (0, 1, 2, 3))


def test_a_strategy_of_one_device_takes_one_when_it_is_named() -> None:
    place = site(CUDA, 4)
    assert place.topology(strategy("one"), named=True).devices == (0,)
    # Left open, it must not win over a strategy that uses what is there.
    assert place.topology(strategy("one"), named=False).devices == (0, 1, 2, 3)


# -- more than there are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "count", "words"),
    [
        (8, 2, "devices=8 was asked for, but accelerator 'cuda' has 2 (0, 1) here"),
        (1, 0, "devices=1 was asked for, but accelerator 'cuda' has none here"),
        ([0, 5], 2, "devices=[0, 5] names device 5, but accelerator 'cuda' has 2 (0, 1) here"),
    ],
)
def test_more_devices_than_there_are(devices: Any, count: int, words: str) -> None:
    with pytest.raises(NotAvailable) as caught:
        site(CUDA, count, devices=devices).topology(strategy(), named=True)
    assert str(caught.value) == words


def test_devices_that_cannot_be_chosen_singly() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^devices=\[0, 1\] picks single devices, which accelerator 'cpu' does not have; "
        r"write devices=2$",
    ):
        site(devices=[0, 1]).topology(strategy(), named=True)


def test_all_devices_where_there_is_none() -> None:
    with pytest.raises(NotAvailable, match=r"^accelerator 'cuda' has no devices here$"):
        site(CUDA, 0, devices="all").topology(strategy(), named=True)


def test_all_devices_of_an_accelerator_that_does_not_count_them() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"^devices='all' \(-1\) has no meaning for accelerator 'cpu', which does not count "
        r"its devices; give a number$",
    ):
        site(devices="all").topology(strategy(), named=True)


# -- a launcher outside ------------------------------------------------------------------------


def test_the_launcher_says_how_many_processes() -> None:
    found = site(detection=torchrun(4, 2)).topology(strategy(), named=True)
    assert found == Topology(num_nodes=2, processes_per_node=2, devices=(0, 1))


def test_chosen_devices_stay_those_under_a_launcher() -> None:
    found = site(CUDA, 4, torchrun(2, 2), devices="2,3").topology(strategy(), named=True)
    assert found == Topology(num_nodes=1, processes_per_node=2, devices=(2, 3))


def test_one_process_a_node_keeps_its_devices_under_a_launcher() -> None:
    place = site(CUDA, 4, torchrun(3, 1))
    found = place.topology(strategy("node"), named=True)
    assert found == Topology(num_nodes=3, processes_per_node=1, devices=(0, 1, 2, 3))
    place.check_started(found, strategy("node"))


def test_a_launcher_that_does_not_say_how_many_per_node() -> None:
    found = site(detection=torchrun(4, None), devices=2).topology(strategy(), named=True)
    assert found == Topology(num_nodes=2, processes_per_node=2, devices=(0, 1))


def test_a_launcher_that_says_nothing() -> None:
    place = site(detection=torchrun(None, None), devices=2, num_nodes=3)
    found = place.topology(strategy(), named=True)
    assert found == Topology(num_nodes=3, processes_per_node=2, devices=(0, 1))
    place.check_started(found, strategy())


def test_more_processes_than_devices() -> None:
    with pytest.raises(
        NotAvailable,
        match=r"^torchrun started this process with 4 per node, but accelerator 'cuda' has "
        r"2 \(0, 1\) here$",
    ):
        site(CUDA, 2, torchrun(4, 4)).topology(strategy(), named=True)


@pytest.mark.parametrize(
    ("devices", "kind", "words"),
    [
        (
            4,
            "device",
            (
                "devices=4 with strategy 'acme' needs 4 process(es) per node, but torchrun started "
                "this process with 2 per node; make the two equal, or leave devices out"
            ),
        ),
        (
            None,
            "one",
            (
                "strategy 'acme' needs 1 process(es) per node, but torchrun started this process "
                "with 2 per node; make the two equal, or leave devices out"
            ),
        ),
        (2, "node", "devices=2 with strategy 'acme' needs 1 process(es) per node, but"),
    ],
)
def test_another_number_than_the_launcher_made(devices: Any, kind: Any, words: str) -> None:
    place = site(detection=torchrun(2, 2), devices=devices)
    topology = place.topology(strategy(kind), named=True)
    with pytest.raises(InvalidRequest) as caught:
        place.check_started(topology, strategy(kind))
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("asked", [None, 2, "1:2", "2:5"])
def test_num_nodes_that_agree_with_the_launcher(asked: Any) -> None:
    place = site(detection=torchrun(4, 2), num_nodes=asked)
    assert place.topology(strategy(), named=True).num_nodes == 2


@pytest.mark.parametrize(("asked", "spelled"), [(3, "3"), (1, "1"), ("3:4", "'3:4'")])
def test_num_nodes_that_contradict_the_launcher(asked: Any, spelled: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        site(detection=torchrun(4, 2), num_nodes=asked).topology(strategy(), named=True)
    assert str(caught.value) == (
        f"num_nodes={spelled} was asked for, but torchrun started this process on 2 node(s); "
        "make the two equal, or leave num_nodes out"
    )


# -- a launcher that says what to write ---------------------------------------------------------


def grid(per_node: int, nodes: int = 1) -> Detection:
    return Detection(
        reason="grid started this process",
        world_size=per_node * nodes,
        processes_per_node=per_node,
        processes_hint="write --tasks={wanted}",
        nodes_hint="write --nodes={wanted}",
        devices_hint="write --share={wanted}",
    )


def test_the_launcher_says_how_to_make_another_number_of_processes() -> None:
    place = site(detection=grid(2), devices=4)
    with pytest.raises(
        InvalidRequest,
        match=r"^devices=4 with strategy 'acme' needs 4 process\(es\) per node, but grid started "
        r"this process with 2 per node; write --tasks=4, or leave devices out$",
    ):
        place.check_started(place.topology(strategy(), named=True), strategy())


@pytest.mark.parametrize(
    ("asked", "spelled", "wanted"), [(3, "3", 3), (1, "1", 1), ("3:5", "'3:5'", 3), ("1:1", "1", 1)]
)
def test_the_launcher_says_how_to_have_another_number_of_nodes(
    asked: Any, spelled: str, wanted: int
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        site(detection=grid(2, nodes=2), num_nodes=asked).topology(strategy(), named=True)
    assert str(caught.value) == (
        f"num_nodes={spelled} was asked for, but grid started this process on 2 node(s); "
        f"write --nodes={wanted}, or leave num_nodes out"
    )


@pytest.mark.parametrize(
    ("devices", "count", "words"),
    [
        (
            None,
            1,
            (
                "grid started this process with 4 per node, but accelerator 'cuda' has 1 (0) here; "
                "write --share=4, or write --tasks=1"
            ),
        ),
        (
            4,
            2,
            (
                "devices=4 was asked for, but accelerator 'cuda' has 2 (0, 1) here; write "
                "--share=4, or write --tasks=2"
            ),
        ),
        (
            None,
            0,
            (
                "grid started this process with 4 per node, but accelerator 'cuda' has none here; "
                "write --share=4"
            ),
        ),
    ],
)
def test_the_launcher_says_how_to_let_processes_see_devices(
    devices: Any, count: int, words: str
) -> None:
    with pytest.raises(NotAvailable) as caught:
        site(CUDA, count, grid(4), devices=devices).topology(strategy(), named=True)
    assert str(caught.value) == words


@given(
    st.one_of(st.none(), st.just("all"), st.integers(1, 9), st.sets(st.integers(0, 9), min_size=1)),
    st.one_of(st.none(), st.integers(0, 8)),
    st.sampled_from(["device", "node", "one"]),
    st.booleans(),
)
def test_a_topology_is_what_was_asked_for_or_an_error(
    devices: Any, count: int | None, processes: Any, named: bool
) -> None:
    asked = sorted(devices) if isinstance(devices, set) else devices
    wanted = 1 if asked is None and named and processes == "one" else asked
    if wanted in (None, "all"):
        possible = bool(count)
    else:
        most = wanted if isinstance(wanted, int) else wanted[-1] + 1
        possible = count is None or most <= count
    try:
        found = site(CUDA, count, devices=asked).topology(strategy(processes), named=named)
    except TorchweftError:
        assert not possible
        return
    assert possible
    expected = range(count or 0) if wanted in (None, "all") else wanted
    assert list(found.devices) == list(range(wanted) if isinstance(wanted, int) else expected)
    assert found.processes_per_node == (len(found.devices) if processes == "device" else 1)
