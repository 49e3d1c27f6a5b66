from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from torchweft.errors import BrokenPlugin, NameClash, NotAvailable, UnknownName
from torchweft.manager import Declared
from torchweft.missing import clashing, package_to_install, unknown_name
from torchweft.specs import StrategySpec

if TYPE_CHECKING:
    from tests.core.conftest import World

BROKEN = Declared(
    plugin="acme",
    distribution="torchweft-acme",
    version="0.1",
    error="ModuleNotFoundError: No module named 'acme_comm'",
)
FAILURE = (
    "plugin 'acme' (torchweft-acme 0.1) failed to load: "
    "ModuleNotFoundError: No module named 'acme_comm'"
)


def broken(distribution: str) -> Declared:
    return Declared(plugin="it", distribution=distribution, version="2", error="OSError: x")


def disabled(distribution: str) -> Declared:
    return Declared(plugin="it", distribution=distribution, version="2", disabled=True)


# -- a name that nobody declares ---------------------------------------------------------------


def test_the_nearest_name_and_those_that_are_known(world: World) -> None:
    world.declare(StrategySpec(name="fsdp", target="a:B"))
    error = unknown_name("strategy", "deepsped", world.catalog)
    assert type(error) is UnknownName
    assert str(error) == (
        "no strategy is called 'deepsped'; did you mean 'deepspeed'? "
        "known here: auto, ddp, fsdp, single_device"
    )


def test_a_name_like_no_other(world: World) -> None:
    assert str(unknown_name("precision", "quux", world.catalog)) == (
        "no precision is called 'quux'; known here: 16-mixed, 32-true, auto, bf16-mixed"
    )


def test_where_the_name_came_from(world: World) -> None:
    error = unknown_name("launcher", "forc", world.catalog, source="TORCHWEFT_LAUNCHER")
    assert str(error).startswith(
        "no launcher is called 'forc' (TORCHWEFT_LAUNCHER); did you mean 'fork'? known here: auto,"
    )


def test_a_well_known_name_of_a_package_that_is_not_installed(world: World) -> None:
    error = unknown_name("strategy", "deepspeed", world.catalog)
    assert type(error) is NotAvailable
    assert str(error) == (
        "strategy 'deepspeed' is in a package that is not installed; "
        "try: pip install torchweft-deepspeed"
    )


def test_a_well_known_name_that_the_installed_package_does_not_have(world: World) -> None:
    error = unknown_name("strategy", "fsdp", world.catalog)
    assert type(error) is NotAvailable
    assert str(error) == (
        "strategy 'fsdp' is not in torchweft-cuda 0.1.0, which is installed; "
        "try: pip install --upgrade torchweft-cuda"
    )


def test_a_well_known_name_of_a_package_that_failed(world: World) -> None:
    world.plugins.append(broken("Torchweft_DeepSpeed"))
    error = unknown_name("strategy", "deepspeed", world.catalog)
    assert type(error) is BrokenPlugin
    assert str(error) == (
        "strategy 'deepspeed' cannot be used: plugin 'it' (Torchweft_DeepSpeed 2) failed to load: "
        "OSError: x"
    )


def test_a_well_known_name_of_a_package_that_is_disabled(world: World) -> None:
    world.plugins.append(disabled("torchweft-deepspeed"))
    error = unknown_name("strategy", "deepspeed", world.catalog)
    assert type(error) is NotAvailable
    assert str(error) == (
        "strategy 'deepspeed' cannot be used: plugin 'it' (torchweft-deepspeed 2) is disabled by "
        "TORCHWEFT_DISABLE_PLUGINS"
    )


def test_a_name_that_a_broken_plugin_might_have_provided(world: World) -> None:
    world.plugins.append(BROKEN)
    error = unknown_name("strategy", "acme", world.catalog)
    assert type(error) is BrokenPlugin
    assert str(error) == (
        "no strategy is called 'acme'; known here: auto, ddp, single_device; "
        f"it might come from a plugin that is not loaded: {FAILURE}"
    )


def test_a_slip_of_the_pen_beside_a_broken_plugin(world: World) -> None:
    world.plugins.append(BROKEN)
    error = unknown_name("strategy", "single_devise", world.catalog)
    assert type(error) is UnknownName
    assert "did you mean 'single_device'?" in str(error)
    assert str(error).endswith(FAILURE)


def test_a_name_that_a_disabled_plugin_might_have_provided(world: World) -> None:
    world.plugins.append(disabled("torchweft-acme"))
    error = unknown_name("strategy", "acme", world.catalog)
    assert type(error) is UnknownName
    assert str(error).endswith(
        "; it might come from a plugin that is not loaded: plugin 'it' (torchweft-acme 2) is "
        "disabled by TORCHWEFT_DISABLE_PLUGINS"
    )


# -- what else would provide it ----------------------------------------------------------------


def test_the_package_to_install(world: World) -> None:
    world.without("cuda")
    assert package_to_install("accelerator", "gpu", world.catalog) == (
        "; 'gpu' is in a package that is not installed; try: pip install torchweft-cuda"
    )
    assert package_to_install("strategy", None, world.catalog) == (
        "; 'ddp' is in a package that is not installed; try: pip install torchweft-cuda"
    )
    assert package_to_install("strategy", "nobody", world.catalog) == ""
    assert package_to_install("launcher", None, world.catalog) == ""


def test_no_package_where_it_is_installed(world: World) -> None:
    assert package_to_install("accelerator", "gpu", world.catalog) == ""
    world.without("cuda")
    world.plugins.append(broken("torchweft-cuda"))
    assert package_to_install("accelerator", "gpu", world.catalog) == (
        "; plugin 'it' (torchweft-cuda 2) failed to load: OSError: x"
    )


# -- a name that two declare -------------------------------------------------------------------


def test_a_clash_names_both_distributions(world: World) -> None:
    world.declare(StrategySpec(name="ddp", target="a:B", devices=("cuda", "cpu")))
    pair = world.catalog.clash("strategy", "ddp")
    assert pair is not None
    error = clashing("strategy", "ddp", pair, source="--strategy")
    assert type(error) is NameClash
    assert str(error) == (
        "strategy 'ddp' (--strategy) is declared by both torchweft-acme 0.1 and torchweft-cuda "
        "0.1.0, for the same devices and strategies; uninstall one of them, or leave one out with "
        "TORCHWEFT_DISABLE_PLUGINS=acme or TORCHWEFT_DISABLE_PLUGINS=cuda"
    )


def test_a_plugin_that_clashes_with_itself(world: World) -> None:
    world.declare(StrategySpec(name="mean", target="a:B"), StrategySpec(name="mean", target="c:D"))
    pair = world.catalog.clash("strategy", "mean")
    assert pair is not None
    assert str(clashing("strategy", "mean", pair)) == (
        "strategy 'mean' is declared twice by torchweft-acme 0.1, for the same devices and "
        "strategies; report this to its authors"
    )


def test_a_clash_of_plugins_that_can_only_be_disabled_together(world: World) -> None:
    for distribution in ("torchweft-a", "torchweft-b"):
        world.declare(
            StrategySpec(name="mean", target="a:B"), plugin="mean", distribution=distribution
        )
    pair = world.catalog.clash("strategy", "mean")
    assert pair is not None
    assert str(clashing("strategy", "mean", pair)).endswith("; uninstall one of them")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("fp16", "'16-mixed' or '16-true'"),
        ("Half", "'16-mixed' or '16-true'"),
        ("fp32", "'32-true'"),
    ],
)
def test_words_of_other_libraries_that_say_too_little(world: World, word: str, meant: str) -> None:
    error = unknown_name("precision", word, world.catalog)
    assert f"no precision is called '{word}'; did you mean {meant}?" in str(error)
