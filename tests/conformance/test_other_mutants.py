"""The kit finds mistakes in accelerators, precisions and launchers too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchweft.testing import AcceleratorConformance, LauncherConformance, PrecisionConformance
from torchweft.testing.declared import find
from torchweft.testing.launcher import LauncherKit
from torchweft.testing.precision import PrecisionKit

#: By kind and mutant: the test that is there for its mistake, with its parameters, and words of
#: what it says.
MISTAKES = {
    "accelerator": {
        "OffByOne": (
            "test_every_rank_is_bound_to_its_device",
            (
                "bind() of local rank 0 with devices=(0, 1) returned device 1; Accelerator.bind "
                "gives local rank 0 the device 0, devices[rank.local_rank]"
            ),
        ),
        "AnotherType": (
            "test_every_rank_is_bound_to_its_device",
            "returned a device of type 'meta', and its spec declares device='cpu'",
        ),
        "ReturnsItsName": (
            "test_every_rank_is_bound_to_its_device",
            "returned 'cpu'; Accelerator.bind returns a torch.device",
        ),
        "ForgetsRandomNumbers": (
            "test_random_numbers_are_restored",
            (
                "set_rng_state(rng_state()) does not bring the same random numbers back "
                "(Accelerator.set_rng_state)"
            ),
        ),
        "TalksToNobody": (
            "test_the_backend_is_known_to_torch",
            "its backend is 'gluu', and torch.distributed knows undefined, gloo",
        ),
        "TouchesEarly": (
            "test_constructing_it_touches_no_device",
            "opened /dev/zero while it was imported and constructed",
        ),
        "CountsNothing": (
            "test_memory_is_counted",
            "bytes was made, and memory() went from {'allocated': 5} to {'allocated': 5}",
        ),
        "HidesItsHazard": (
            "test_a_fork_after_use_works_or_is_warned_of",
            "fork_hazard() returned None after the device was used, and a fork could not use it",
        ),
    },
    "precision": {
        "ClipsScaled": (
            "test_clipping_sees_true_gradients",
            "Precision.unscale makes gradients the true ones before they are clipped",
        ),
        "NeverUnscales": ("test_it_trains_as_float64_does sgd", "the loss of step 1 is"),
        "StepsInSpite": (
            "test_a_step_that_overflows_is_skipped loss True",
            "Precision.step skips a step whose gradients overflowed",
        ),
        "ForgetsItsScale": (
            "test_a_checkpoint_goes_on_as_if_nothing_had_been",
            "Precision.state_dict holds what the next step needs to be the same",
        ),
        "ScalesInSecret": (
            "test_a_plain_backward_is_right_or_refused",
            "a precision for which that is so declares scales_loss = True",
        ),
        "ConvertsEverything": (
            "test_what_is_no_float_reaches_the_model_as_it_is",
            "an int64 reached the model as torch.float32",
        ),
        "LeavesADefault": (
            "test_the_process_is_left_as_it_was",
            "a Precision changes them inside of forward_context() alone",
        ),
        "OneContext": ("test_the_context_ends", "(Precision.forward_context)"),
        "MakesAnother": (
            "test_parameters_have_one_dtype_however_they_are_made",
            (
                "parameters are bfloat16 after setup(), and float32 when they were made under "
                "init_module()"
            ),
        ),
        "KeepsTheResult": (
            "test_a_step_returns_what_the_optimizer_returns",
            "optimizer.step() returned None in place of what the optimizer's own step returns",
        ),
        "KeepsGradients": ("test_gradients_are_forgotten True", "(Precision.zero_grad)"),
    },
    "launcher": {
        "Lonely": (
            "test_every_rank_is_made_once",
            "2 ranks were to be made, and those that came to be say that they are [0, 0]",
        ),
        "LeavesAProcess": ("test_no_process_is_left", "there still run"),
        "OfTheLastRank": (
            "test_the_result_is_that_of_rank_0",
            "launch(function) returned what rank 1 returned",
        ),
        "Deaf": (
            "test_a_function_that_fails_raises_rank_failed raise",
            "Launcher.launch raises RankFailed",
        ),
    },
}


def name_of(cls: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in cls).removeprefix("-")


def conformance(kind: str, name: str, **attributes: Any) -> Any:
    """What an author writes."""
    base: Any = {
        "accelerator": AcceleratorConformance,
        "precision": PrecisionConformance,
        "launcher": LauncherConformance,
    }[kind]
    return type("TestMine", (base,), {kind: name, **attributes})


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The mutants, as pip would install them; for the processes of the tests too."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(Path(__file__).with_name("other_mutants.py"), folder / "weft_mutants.py")
    info = folder / "weft_mutants-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weft-mutants\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[torchweft]\nweft_mutants = weft_mutants\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def launchers(
    installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LauncherKit]]:
    """By mutant; all of them run in the background while others are tested."""
    kits = {}
    for mutant, (test, _) in MISTAKES["launcher"].items():
        cls = conformance("launcher", name_of(mutant))
        kits[mutant] = LauncherKit(cls, tmp_path_factory.mktemp("launches"))
        kits[mutant].begin(getattr(cls, test.split()[0]).roles)
    yield kits
    for kit in kits.values():
        kit.launches.close()


def words_of(test: Any, *args: Any) -> str:
    with pytest.raises(AssertionError) as failed:
        test(*args)
    return " ".join(str(failed.value).split())


ALL = [(kind, mutant) for kind, mutants in MISTAKES.items() for mutant in mutants]


@pytest.mark.parametrize(("kind", "mutant"), ALL)
def test_a_mistake_is_found(
    launchers: dict[str, LauncherKit], kind: str, mutant: str, tmp_path: Path
) -> None:
    asked, words = MISTAKES[kind][mutant]
    test, *parameters = asked.split()
    cls = conformance(kind, name_of(mutant))
    subject = launchers[mutant] if kind == "launcher" else begin(kind, cls, tmp_path)
    arguments = [bool(word) if word == "True" else word for word in parameters]
    said = words_of(getattr(cls(), test), subject, *arguments)
    assert words in said
    assert said.startswith(f"{kind} '{name_of(mutant)}'")


def test_what_is_right_passes() -> None:
    """Devices with numbers, on a processor."""
    cls = conformance("accelerator", "indexed")
    subject = find(cls, "accelerator")
    cls().test_every_rank_is_bound_to_its_device(subject)
    cls().test_ranks_are_bound_to_the_devices_asked_for(subject)


# -- classes that cannot be tested -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "attributes", "words"),
    [
        (
            "accelerator",
            {"accelerator": ""},
            (
                "TestMine does not say what it tests; write accelerator = 'NAME' in it, the name "
                "under which a plugin declares the accelerator"
            ),
        ),
        (
            "precision",
            {"precision": "bf17-mixed"},
            "TestMine: no precision is called 'bf17-mixed'; did you mean 'bf16-mixed'?",
        ),
        (
            "launcher",
            {"launcher": "fork:nice"},
            "TestMine: launcher='fork:nice' has 'nice' where an option belongs",
        ),
        (
            "launcher",
            {"launcher": "torchrun"},
            (
                "TestMine: somebody outside starts the ranks of launcher 'torchrun' "
                "(LauncherSpec.outside); write how in command = ("
            ),
        ),
        (
            "launcher",
            {"launcher": "fork", "command": ("{python}", "{script}")},
            (
                "TestMine: command is for launchers that are outside, and launcher 'fork' makes "
                "its ranks itself (LauncherSpec.outside); leave it out"
            ),
        ),
    ],
)
def test_a_class_that_is_wrong_says_why(
    kind: str, attributes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    cls = conformance(kind, "", **attributes)
    with pytest.raises(pytest.fail.Exception) as failed:
        begin(kind, cls, tmp_path)
    assert words in str(failed.value)


def begin(kind: str, cls: Any, folder: Path) -> Any:
    if kind == "accelerator":
        return find(cls, kind)
    return PrecisionKit(cls, folder) if kind == "precision" else LauncherKit(cls, folder)


@pytest.mark.parametrize("kind", ["accelerator", "precision", "launcher"])
def test_without_a_device_the_probe_says_why_it_is_skipped(kind: str, tmp_path: Path) -> None:
    cls = conformance(kind, "fork" if kind == "launcher" else "32-true", accelerator="nowhere")
    with pytest.raises(pytest.skip.Exception) as skipped:
        begin(kind, cls, tmp_path)
    said = "accelerator 'nowhere' cannot be used here: there is none; buy one"
    assert str(skipped.value) == said
