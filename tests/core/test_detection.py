from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from torchweft.catalog import Catalog
from torchweft.detection import detect
from torchweft.errors import InvalidRequest, NameClash
from torchweft.manager import Declared
from torchweft.specs import Detection, LauncherSpec


def _raise(error: BaseException) -> Any:
    raise error


#: What each launcher's detection answers, by the value of WHO.
ANSWERS: dict[str, Any] = {
    "nothing": lambda who: None,
    "torchrun": lambda who: Detection(reason="torchrun made it") if "torchrun" in who else None,
    "slurm": lambda who: Detection(reason="srun made it") if "slurm" in who else None,
    "lsf": lambda who: Detection(reason="bsub made it") if "lsf" in who else None,
    "broken": lambda who: _raise(KeyError("JOB")),
    "exits": lambda who: _raise(SystemExit(3)),
    "confused": lambda who: True,
    "strict": lambda who: _raise(InvalidRequest("RANK is 'x'")),
}


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("detecting_backend")
    for name, answer in ANSWERS.items():
        setattr(module, name, lambda environ, answer=answer: answer(environ.get("WHO", "")))
    monkeypatch.setitem(sys.modules, "detecting_backend", module)


def catalog(**priorities: int | None) -> Catalog:
    specs = tuple(
        LauncherSpec(name=name, target="a:B", detect=f"detecting_backend:{name}", priority=priority)
        for name, priority in priorities.items()
    )
    return Catalog(
        [Declared(plugin="acme", distribution="torchweft-acme", version="0.1", specs=specs)]
    )


def found(who: str, wanted: str | None = None, **priorities: int | None) -> str | None:
    entry = detect(catalog(**priorities), {"WHO": who}, wanted).entry
    return entry and entry.spec.name


def test_nobody_made_this_process() -> None:
    detected = detect(catalog(nothing=1, torchrun=2), {}, None)
    assert (detected.entry, detected.detection, detected.failed) == (None, None, ())


def test_a_launcher_without_a_detection_is_not_asked() -> None:
    plain = LauncherSpec(name="inline", target="a:B")
    declared = Declared(plugin="a", distribution="a", version="1", specs=(plain,))
    assert detect(Catalog([declared]), {"WHO": "torchrun"}, None).entry is None


def test_who_made_it_and_what_it_says() -> None:
    detected = detect(catalog(nothing=1, torchrun=2), {"WHO": "torchrun"}, None)
    assert detected.entry is not None
    assert detected.entry.describe() == "'torchrun' (torchweft-acme 0.1)"
    assert detected.detection == Detection(reason="torchrun made it")


def test_of_several_the_higher_priority_is_nearer() -> None:
    assert found("torchrun in slurm", torchrun=200, slurm=100) == "torchrun"
    assert found("torchrun in slurm", torchrun=100, slurm=None) == "torchrun"


def test_of_several_the_one_that_was_asked_for_counts() -> None:
    assert found("torchrun in slurm", "slurm", torchrun=200, slurm=100) == "slurm"
    # What was asked for and did not make it leaves the others as they are.
    assert found("torchrun in slurm", "lsf", torchrun=200, slurm=100, lsf=1) == "torchrun"


def test_several_of_one_priority_are_an_error() -> None:
    with pytest.raises(
        NameClash,
        match=r"^bsub made it according to launcher 'lsf' \(torchweft-acme 0\.1\), and srun made "
        r"it according to launcher 'slurm' \(torchweft-acme 0\.1\); say which it is with "
        r"launcher='…' or TORCHWEFT_LAUNCHER$",
    ):
        found("slurm over lsf", slurm=100, lsf=100)
    assert found("slurm over lsf", "lsf", slurm=100, lsf=100) == "lsf"


def test_a_detection_that_fails_breaks_nothing_and_is_told() -> None:
    detected = detect(catalog(broken=1, exits=1, confused=1, torchrun=1), {"WHO": "torchrun"}, None)
    assert detected.entry is not None
    assert detected.entry.spec.name == "torchrun"
    assert {failed.name: failed.reason for failed in detected.failed} == {
        "broken": "its detection 'detecting_backend:broken' failed: KeyError: 'JOB'",
        "exits": "its detection 'detecting_backend:exits' failed: SystemExit: 3",
        "confused": "its detection 'detecting_backend:confused' returned True instead of a "
        "Detection",
    }


def test_a_detection_that_cannot_be_loaded_is_told_too() -> None:
    spec = LauncherSpec(name="gone", target="a:B", detect="acme_gone:detect")
    declared = Declared(plugin="a", distribution="torchweft-a", version="1", specs=(spec,))
    (failed,) = detect(Catalog([declared]), {}, None).failed
    assert failed.reason.endswith(
        "cannot be loaded: ModuleNotFoundError: No module named 'acme_gone'"
    )


def test_an_environment_that_contradicts_itself_is_the_users_to_know() -> None:
    with pytest.raises(InvalidRequest, match=r"^RANK is 'x'$"):
        found("torchrun", torchrun=1, strict=1)
    # One that counts less has the word only where no other answers.
    assert found("torchrun", torchrun=2, strict=1) == "torchrun"
    assert found("torchrun", "torchrun", torchrun=1, strict=2) == "torchrun"
    with pytest.raises(InvalidRequest, match=r"^RANK is 'x'$"):
        found("torchrun", "strict", torchrun=2, strict=1)
    with pytest.raises(InvalidRequest, match=r"^RANK is 'x'$"):
        found("", torchrun=2, strict=1)


def test_those_further_out_are_told_with_the_order() -> None:
    who = {"WHO": "torchrun in slurm over lsf"}
    priorities: dict[str, int | None] = {"slurm": 160, "torchrun": 200, "lsf": None}
    nearest = detect(catalog(**priorities), who, None)
    assert [(other.name, other.reason) for other in nearest.others] == [
        ("lsf", "bsub made it too, but 'torchrun' is nearer to it: priority 200 over 0"),
        ("slurm", "srun made it too, but 'torchrun' is nearer to it: priority 200 over 160"),
    ]
    asked = detect(catalog(**priorities), who, "slurm")
    assert [(other.name, other.reason) for other in asked.others] == [
        ("lsf", "bsub made it too, but 'slurm' was asked for"),
        ("torchrun", "torchrun made it too, but 'slurm' was asked for"),
    ]
