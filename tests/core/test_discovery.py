from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchweft.discovery import Found, canonical, discover

if TYPE_CHECKING:
    from tests.core.conftest import Site

LISTING = """
import json
from torchweft.discovery import discover
print(json.dumps([
    [f.name, f.distribution, f.version, f.module and f.module.__name__, f.error, f.disabled]
    for f in discover(blocked=frozenset({blocked!r}))
]))
"""
GOOD = "NAME = 'acme'\n"


def found(site: Site, *blocked: str) -> dict[tuple[str, str], list[Any]]:
    """What discovery finds beside the plugins of the environment, by name and distribution."""
    listed = json.loads(site.run(LISTING.replace("{blocked!r}", repr(set(blocked) or set()))))
    return {(each[0], each[1]): each[2:] for each in listed}


def test_the_environment_has_the_core_as_a_plugin() -> None:
    core = next(each for each in discover() if each.name == "builtin")
    assert core.distribution == "torchweft"
    assert core.provider == f"torchweft {core.version}"
    assert core.module is not None
    assert core.module.__name__ == "torchweft.builtin.hooks"


def test_a_group_that_nobody_uses_is_empty() -> None:
    assert discover("torchweft_nobody_uses_this") == []


def test_a_real_distribution_is_found(site: Site) -> None:
    site.install("torchweft-acme", GOOD)
    assert found(site)["acme", "torchweft-acme"] == ["0.1", "acme_hooks", "", False]


def test_a_plugin_whose_dependency_is_missing_is_recorded(site: Site) -> None:
    site.install("torchweft-acme", "import acme_comm")
    site.install("torchweft-good", GOOD, plugin="good", module="good_hooks")
    listed = found(site)
    assert listed["acme", "torchweft-acme"] == [
        "0.1",
        None,
        "ModuleNotFoundError: No module named 'acme_comm'",
        False,
    ]
    assert listed["good", "torchweft-good"][1] == "good_hooks"
    assert ("builtin", "torchweft") in listed


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def broken(:", "SyntaxError: invalid syntax (acme_hooks.py, line 1)"),
    ],
)
def test_a_plugin_that_fails_on_import_breaks_nothing(site: Site, hooks: str, error: str) -> None:
    site.install("torchweft-acme", hooks)
    listed = found(site)
    assert listed["acme", "torchweft-acme"] == ["0.1", None, error, False]
    assert listed["builtin", "torchweft"][2] == ""


def test_a_blocked_plugin_is_not_imported(site: Site) -> None:
    site.install("torchweft-acme", "raise SystemExit('imported')")
    assert found(site, "acme")["acme", "torchweft-acme"] == ["0.1", None, "", True]


def test_an_entry_point_that_names_an_attribute_is_an_error(site: Site) -> None:
    site.install("torchweft-acme", GOOD, entry_points="[torchweft]\nacme = acme_hooks:NAME\n")
    assert found(site)["acme", "torchweft-acme"][2] == (
        "BrokenPlugin: its entry point 'acme_hooks:NAME' names an attribute; "
        "it has to name a module of hooks"
    )


def test_entry_points_that_nobody_can_read_are_an_error_of_their_distribution(
    site: Site,
) -> None:
    site.install("torchweft-acme", GOOD, entry_points="[torchweft]\nacme acme_hooks\n")
    # Somebody else's broken file is no concern of torchweft's.
    site.install("other", None, entry_points="[console_scripts]\nother other\n")
    listed = found(site)
    version, module, error, disabled = listed["torchweft-acme", "torchweft-acme"]
    assert (version, module, disabled) == ("0.1", None, False)
    assert error.startswith("TypeError: ")
    assert not any(distribution == "other" for _, distribution in listed)


def test_a_distribution_without_metadata_is_listed_all_the_same(site: Site) -> None:
    site.install("torchweft-acme", GOOD)
    (site.folder / "torchweft_acme-0.1.dist-info" / "METADATA").unlink()
    assert found(site)["acme", "an unnamed distribution"][1] == "acme_hooks"


def test_of_two_copies_the_first_on_the_path_counts(site: Site) -> None:
    site.install("torchweft-acme", GOOD)
    second = type(site)(site.folder / "second")
    second.folder.mkdir()
    second.install("torchweft_Acme", GOOD, version="0.2")
    listed = json.loads(
        site.run(
            f"import sys; sys.path.append({str(second.folder)!r})\n"
            + LISTING.replace("{blocked!r}", "set()")
        )
    )
    assert [each[1:3] for each in listed if each[0] == "acme"] == [["torchweft-acme", "0.1"]]


def test_the_traceback_is_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_acme.py").write_text("def setup():\n    import acme_comm\nsetup()\n")
    info = tmp_path / "torchweft_acme-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: torchweft-acme\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[torchweft_test_trace]\nacme = broken_acme\n")
    monkeypatch.syspath_prepend(tmp_path)
    (broken,) = discover("torchweft_test_trace")
    assert "in setup" in broken.trace
    assert broken.trace.rstrip().endswith(broken.error)


def test_a_plugin_without_a_version_has_a_provider_all_the_same() -> None:
    assert Found(name="acme", distribution="torchweft-acme", version="").provider == (
        "torchweft-acme"
    )


@pytest.mark.parametrize("name", ["torchweft-cuda", "Torchweft_CUDA", "torchweft.cuda"])
def test_one_spelling_of_a_name(name: str) -> None:
    assert canonical(name) == "torchweft-cuda"


@given(st.text(alphabet="aZ-_.1", max_size=12))
def test_the_one_spelling_is_its_own(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)
