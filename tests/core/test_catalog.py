from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.catalog import Catalog, Entry, disjoint, narrower, probe
from torchweft.manager import Declared
from torchweft.specs import AcceleratorSpec, Availability, PrecisionSpec, StrategySpec

if TYPE_CHECKING:
    from tests.core.conftest import World


def strategy(name: str = "fsdp", **fields: Any) -> StrategySpec:
    return StrategySpec(name=name, target="acme:Acme", **fields)


# -- names -------------------------------------------------------------------------------------


def test_an_entry_is_found_by_name_alias_and_preset(world: World) -> None:
    catalog = world.catalog
    for name in ("ddp", "ddp_spawn", "ddp_find_unused_parameters_true"):
        assert [entry.spec.name for entry in catalog.named("strategy", name)] == ["ddp"]
    assert catalog.named("precision", "ddp") == ()
    assert catalog.names("precision") == ("16", "16-mixed", "32", "32-true", "bf16", "bf16-mixed")


def test_an_alias_may_be_shared_by_different_devices(world: World) -> None:
    catalog = world.catalog
    assert [e.spec.name for e in catalog.named("accelerator", "gpu")] == ["cuda", "mps"]
    assert catalog.clash("accelerator", "gpu") is None


def test_the_order_of_installation_does_not_matter(world: World) -> None:
    world.declare(strategy("aaa"), strategy("zzz"))
    forth, back = world.catalog, Catalog(reversed(world.plugins))
    for kind in ("accelerator", "strategy", "precision", "launcher"):
        assert forth.entries(kind) == back.entries(kind)


def test_an_entry_describes_itself(world: World) -> None:
    (entry,) = world.catalog.named("strategy", "ddp_spawn")
    assert entry.describe() == "'ddp' (torchweft-cuda 0.1.0)"
    assert entry.plugin == "cuda"


def test_broken_plugins_are_kept(world: World) -> None:
    broken = Declared(plugin="a", distribution="torchweft-a", version="1", error="OSError: x")
    world.plugins.append(broken)
    assert world.catalog.broken == (broken,)


# -- clashes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "clashes"),
    [
        ({}, {}, True),
        ({"devices": ("cuda",)}, {"devices": ("cuda",)}, True),
        ({"devices": ("cuda",)}, {}, False),
        ({"devices": ("cuda",)}, {"devices": ("cuda", "cpu")}, False),
        ({"devices": ("cuda", "cpu")}, {"devices": ("cuda", "xla")}, True),
        ({"devices": ("cuda",)}, {"devices": ("xla",)}, False),
    ],
)
def test_two_of_one_name_clash_unless_a_case_decides(
    world: World, first: dict[str, Any], second: dict[str, Any], clashes: bool
) -> None:
    world.declare(strategy(**first), plugin="a", distribution="torchweft-a")
    world.declare(strategy(**second), plugin="b", distribution="torchweft-b")
    pair = world.catalog.clash("strategy", "fsdp")
    assert (pair is not None) is clashes
    if pair is not None:
        assert [entry.provider for entry in pair] == ["torchweft-a 0.1", "torchweft-b 0.1"]


def test_a_restriction_to_strategies_decides_too(world: World) -> None:
    own = PrecisionSpec(name="bf16-mixed", target="acme:Own", strategies=("deepspeed",))
    world.declare(own)
    assert world.catalog.clash("precision", "bf16-mixed") is None
    # Narrower on one axis and wider on the other decides nothing.
    world.declare(
        PrecisionSpec(name="bf16-mixed", target="acme:Own", devices=("cuda",)), plugin="other"
    )
    assert world.catalog.clash("precision", "bf16-mixed") is not None


def test_every_party_to_a_clash_is_marked(world: World) -> None:
    for plugin in "abc":
        world.declare(strategy(), plugin=plugin, distribution=f"torchweft-{plugin}")
    rows = {row.provider: row for row in world.catalog.rows() if row.name == "fsdp"}
    assert rows["torchweft-c 0.1"].clash == (
        "'fsdp' is also declared by torchweft-a 0.1; 'fsdp' is also declared by torchweft-b 0.1"
    )
    assert all(row.clash for row in rows.values())
    assert not any(row.clash for row in world.catalog.rows() if row.name != "fsdp")


# -- availability ------------------------------------------------------------------------------


def test_a_row_says_what_a_listing_needs(world: World) -> None:
    world.plugins[1] = Declared(
        plugin="cuda",
        distribution="torchweft-cuda",
        version="0.1.0",
        specs=(
            AcceleratorSpec(
                name="cuda",
                target="a:B",
                summary="NVIDIA GPUs",
                aliases=("gpu",),
                device="cuda",
                probe="example_backend:cuda",
            ),
        ),
    )
    row = next(row for row in world.catalog.rows() if row.name == "cuda")
    assert (row.kind, row.aliases, row.provider, row.summary) == (
        "accelerator",
        ("gpu",),
        "torchweft-cuda 0.1.0",
        "NVIDIA GPUs",
    )
    assert (row.available, row.reason, row.hint) == (
        False,
        "there is no NVIDIA driver",
        "install the driver",
    )
    world.gpus = 2
    assert next(row for row in world.catalog.rows() if row.name == "cuda").available


def test_rows_are_by_kind_and_name(world: World) -> None:
    kinds = [row.kind for row in world.catalog.rows()]
    assert kinds == sorted(kinds, key=["accelerator", "strategy", "precision", "launcher"].index)


def test_presets_are_listed_as_aliases(world: World) -> None:
    row = next(row for row in world.catalog.rows() if row.name == "ddp")
    assert row.aliases == ("ddp_spawn", "ddp_find_unused_parameters_true")


def test_without_a_probe_a_spec_is_available() -> None:
    assert probe(Entry(spec=strategy(), provider="acme 0.1")) == Availability(ok=True)


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: _raise(OSError("no driver")), "failed: OSError: no driver"),
        (lambda: _raise(SystemExit(1)), "failed: SystemExit: 1"),
        (lambda: True, "failed: BrokenPlugin: it returned True instead of an Availability"),
    ],
)
def test_a_probe_that_fails_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
) -> None:
    module: Any = ModuleType("acme_probe")
    module.ask = answer
    monkeypatch.setitem(sys.modules, "acme_probe", module)
    found = probe(Entry(spec=strategy(probe="acme_probe:ask"), provider="torchweft-acme 0.1"))
    assert not found.ok
    assert found.reason == f"the probe 'acme_probe:ask' of torchweft-acme 0.1 {reason}"
    assert found.hint == "report this to the authors of torchweft-acme 0.1"


# -- narrower and disjoint ---------------------------------------------------------------------

AXES = st.frozensets(st.sampled_from("abc")).map(lambda words: tuple(sorted(words)))
SPECS = st.builds(
    lambda devices, strategies: PrecisionSpec(
        name="x", target="a:B", devices=devices, strategies=strategies
    ),
    AXES,
    AXES,
)


def cases(spec: PrecisionSpec) -> set[tuple[str, str]]:
    """Every case that a spec serves, in a world with one device and strategy more than it names."""
    return {(d, s) for d in spec.devices or "abcd" for s in spec.strategies or "abcd"}


@given(SPECS, SPECS)
def test_narrower_is_serving_strictly_less(a: PrecisionSpec, b: PrecisionSpec) -> None:
    assert narrower(a, b) == (cases(a) < cases(b))


@given(SPECS, SPECS)
def test_disjoint_is_sharing_no_case(a: PrecisionSpec, b: PrecisionSpec) -> None:
    assert disjoint(a, b) == cases(a).isdisjoint(cases(b))


@given(st.lists(SPECS, max_size=5), st.sampled_from("abcd"), st.sampled_from("abcd"))
def test_without_a_clash_one_spec_wins_every_case(
    specs: list[PrecisionSpec], device: str, strategy: str
) -> None:
    declared = [
        Declared(plugin=f"p{i}", distribution=f"d{i}", version="1", specs=(spec,))
        for i, spec in enumerate(specs)
    ]
    catalog = Catalog(declared)
    serving = [spec for spec in specs if (device, strategy) in cases(spec)]
    if catalog.clash("precision", "x") is None and serving:
        winners = [a for a in serving if not any(narrower(b, a) for b in serving)]
        assert len(winners) == 1
