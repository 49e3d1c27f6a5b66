"""Whether a precision is right: formats, gradients, skipped steps and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from torchweft.errors import RankFailed
from torchweft.testing import rounding
from torchweft.testing.declared import Subject, find
from torchweft.testing.models import Samples, build
from torchweft.testing.ranks import RanksTimeout, run_ranks
from torchweft.testing.rounding import BATCH, SEED, STEPS, Call, Failed, Stepped

__all__ = ["PrecisionConformance", "PrecisionKit"]

_KIT = pytest.StashKey["PrecisionKit"]()

#: Far above the norms that are clipped, and far below.
_LOOSE, _TIGHT = 1e3, 0.2
#: How much of what is only counted differently may be lost.
_SAME = 1e-6

#: What is asked in one run, which saves most of the time.
LOOKS: Sequence[Call] = [
    (function, ())
    for function in (
        rounding.formats,
        rounding.inputs,
        rounding.outputs,
        rounding.evaluate,
        rounding.enter_contexts,
    )
]
TRAININGS: Sequence[Call] = [
    (rounding.train, ("sgd",)),
    (rounding.train, ("adamw",)),
    (rounding.accumulate, (1,)),
    (rounding.accumulate, (2,)),
    (rounding.forget, (True,)),
    (rounding.forget, (False,)),
    (rounding.clip, (_LOOSE, _TIGHT)),
    (rounding.unscale, ()),
    (rounding.backward_plainly, ()),
    (rounding.returned, ()),
    (rounding.closure, ()),
    (rounding.read, ()),
]


class PrecisionKit:
    """What the tests of one class share: what is tested, and what its ranks answered already."""

    def __init__(self, cls: type[PrecisionConformance], folder: Path) -> None:
        subject = _subject(cls)
        self.cls = cls
        self.title = subject.title
        self.folder = folder
        self.scales_loss: bool = subject.load().scales_loss
        self._answers: dict[Any, list[Any]] = {}

    def _run(self, function: Any, *args: Any, **instead: Any) -> list[Any]:
        """What each rank answers."""
        arguments = {
            "accelerator": self.cls.accelerator,
            "strategy": self.cls.strategy,
            "precision": self.cls.precision,
            "timeout": self.cls.timeout,
            **instead,
        }
        return run_ranks(self.cls.devices, function, *args, **arguments)

    def once(self, function: Any, *args: Any, **instead: Any) -> list[Any]:
        """The same, asked once for all tests."""
        key = (function, args, tuple(instead.items()))
        if key not in self._answers:
            for calls in (LOOKS, TRAININGS):
                if (function, args) in calls and not instead:
                    self._answer_together(calls)
        if key not in self._answers:
            self._answers[key] = self._run(function, *args, **instead)
        return self._answers[key]

    def _answer_together(self, calls: Sequence[Call]) -> None:
        """Answer several questions in one run; what fails there is asked alone."""
        try:
            told = self._run(rounding.several, calls)
        except (RankFailed, RanksTimeout):
            return
        for (function, args), *answers in zip(calls, *told, strict=True):
            if not any(isinstance(answer, Failed) for answer in answers):
                self._answers[function, args, ()] = answers

    def saved(self, **instead: Any) -> tuple[Path, list[Stepped]]:
        """A checkpoint of mid-training, and what its ranks saw afterwards."""
        path = self.folder / f"{'-'.join(instead.values())}.ckpt"
        return path, self.once(rounding.save_midway, path, **instead)

    @property
    def tolerance(self) -> float:
        """The declared one, or that of the formats."""
        return self.cls.tolerance or _by_dtypes(self.once(rounding.formats)[0])

    @property
    def rough(self) -> float:
        """The tolerance where something else computes in 32-bit."""
        return max(self.tolerance, 1e-4)

    def near(self, found: Any, right: Any, tolerance: float | None = None) -> bool:
        """Whether numbers are as near as the tolerance wants; nan never is."""
        scale = max(1.0, torch.as_tensor(right).double().abs().max().item())
        return _gap(found, right) <= (tolerance or self.tolerance) * scale

    def check(self, told: list[Any], right: Mapping[str, Tensor], what: str) -> None:
        """Compare the parameters of each rank with those of plain torch."""
        for rank, values in enumerate(told):
            for name, wanted in right.items():
                assert self.near(values[name], wanted), (
                    f"{self.title}, {what}: in rank {rank} parameter '{name}' is "
                    f"{_gap(values[name], wanted):.3g} away from that of float64 (tolerance "
                    f"{self.tolerance:g})"
                )


class PrecisionConformance:
    """Whether a precision trains as 64-bit does, within what it rounds. Subclass it.

    ::

        class TestMine(PrecisionConformance):
            precision = "mine"
            tolerance = 0.02

    Whether it scales the loss is read from its class.

    Attributes:
        precision: its name, with options as a user writes them (``"mine:init_scale=1024"``).
        accelerator: on which devices; without them every test is skipped.
        strategy: with which strategy.
        devices: on how many.
        tolerance: how far losses, norms and parameters may be from those that plain torch computes
            in float64; relative for numbers above 1. None: by the dtypes of parameters and
            computation, the coarser of the two: 1e-10 in 64-bit, 1e-5 in 32-bit, four units in
            the last place in fewer (0.03 in bfloat16, 0.004 in float16).
        timeout: seconds for each run of ranks.
    """

    precision: ClassVar[str] = ""
    accelerator: ClassVar[str] = "cpu"
    strategy: ClassVar[str] = "auto"
    devices: ClassVar[int] = 1
    tolerance: ClassVar[float | None] = None
    timeout: ClassVar[float] = 60.0

    @pytest.fixture
    def kit(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> PrecisionKit:
        """What the tests share; skips where the precision cannot be used."""
        node: Any = request.node.getparent(pytest.Class)
        if _KIT not in node.stash:
            node.stash[_KIT] = PrecisionKit(type(self), tmp_path_factory.mktemp("precision"))
        kit: PrecisionKit = node.stash[_KIT]
        return kit

    # -- formats ---------------------------------------------------------------------------------

    def test_parameters_have_one_dtype_however_they_are_made(self, kit: PrecisionKit) -> None:
        """``Precision.init_dtype`` is the dtype that ``convert_module`` makes."""
        told = kit.once(rounding.formats)[0]
        assert told["setup"] == [told["init_module"]], (
            f"{kit.title}: parameters are {' and '.join(told['setup'])} after setup(), and "
            f"{told['init_module']} when they were made under init_module(); Precision.init_dtype "
            "is the dtype that Precision.convert_module makes"
        )

    def test_a_module_keeps_its_counts_and_what_it_shares(self, kit: PrecisionKit) -> None:
        """``Precision.convert_module``: integer buffers stay, one weight stays one."""
        told = kit.once(rounding.formats)[0]
        assert told["counts"] == "int64", (
            f"{kit.title}: a buffer of int64 became {told['counts']}; "
            "Precision.convert_module converts floating-point numbers alone"
        )
        assert told["tied"], (
            f"{kit.title}: a weight that two layers shared became two; "
            "Precision.convert_module converts in place where torch does"
        )

    def test_it_knows_its_device(self, kit: PrecisionKit) -> None:
        """``Precision.start``, where a class overrides it, calls that of the base class."""
        told, right = kit.once(rounding.formats)[0]["device_type"]
        assert told == right, (
            f"{kit.title}: its device_type is '{told}' on a device of type '{right}'; a "
            "Precision.start of its own calls super().start(device)"
        )

    def test_what_is_no_float_reaches_the_model_as_it_is(self, kit: PrecisionKit) -> None:
        """``Precision.convert_input`` converts floating-point tensors alone."""
        told = kit.once(rounding.inputs)[0]
        seen, given = told["seen"], told["given"]
        pairs = {
            "an int64": (seen["int"], given["int"]),
            "a bool": (seen["bool"], given["bool"]),
            "a uint8": (seen["byte"], given["byte"]),
            "an int64 in collections": (seen["deep"][1][0], given["deep"][1][0]),
            "an int64 in a named tuple": (seen["pair"].second, given["pair"].second),
            "an int64 in a dataclass": (seen["item"].label, given["item"].label),
        }
        for what, (found, right) in pairs.items():
            assert found.dtype == right.dtype, (
                f"{kit.title}: {what} reached the model as {found.dtype}; "
                "Precision.convert_input converts floating-point tensors alone"
            )
            assert torch.equal(found, right), (
                f"{kit.title}: {what} {right.tolist()} reached the model as {found.tolist()} "
                "(Precision.convert_input)"
            )
        kept = (seen["text"], seen["numbers"])
        assert kept == ("kept", [1, 2.5, None]), (
            f"{kit.title}: what is no tensor reached the model as {kept} (Precision.convert_input)"
        )

    def test_floats_reach_the_model_in_one_dtype(self, kit: PrecisionKit) -> None:
        """``Precision.convert_input`` goes into collections and keeps their classes and values."""
        told = kit.once(rounding.inputs)[0]
        seen, data = told["seen"], told["data"]
        tensors = {
            "float": seen["float"],
            "deep": seen["deep"][0],
            "deeper": seen["deep"][1][1]["more"],
            "pair": seen["pair"].first,
            "item": seen["item"].image,
        }
        dtypes = {where: str(tensor.dtype) for where, tensor in tensors.items()}
        assert len(set(dtypes.values())) == 1, (
            f"{kit.title}: tensors of one dtype reached the model in several: {dtypes} "
            "(Precision.convert_input)"
        )
        for where, tensor in tensors.items():
            assert kit.near(tensor, data), (
                f"{kit.title}: {data.tolist()} reached the model as {tensor.tolist()}, in "
                f"'{where}' (Precision.convert_input)"
            )
        classes = (type(seen["pair"]).__name__, type(seen["item"]).__name__)
        assert classes == ("Pair", "Item"), (
            f"{kit.title}: a named tuple and a dataclass reached the model as {classes} "
            "(Precision.convert_input)"
        )
        assert told["given"]["float"].dtype == torch.float32, (
            f"{kit.title}: convert_input changed the user's own batch"
        )

    def test_outputs(self, kit: PrecisionKit) -> None:
        """``Precision.convert_output`` converts floating-point tensors alone, all of them alike.

        Those of an ``Autocast`` come back in torch's default dtype.
        """
        told = kit.once(rounding.outputs)[0]
        output = told["output"]
        floats = [output["float"], output["deep"][0], output["deep"][1][0], output["pair"].first]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in floats]
        assert len(set(dtypes)) == 1, (
            f"{kit.title}: outputs of one dtype come back in several: {dtypes} "
            "(Precision.convert_output)"
        )
        if told["autocast"]:
            assert (dtypes[0], told["under float64"]) == (told["default"], "float64"), (
                f"{kit.title}: outputs come back in {dtypes[0]} where torch's default dtype is "
                f"{told['default']}, and in {told['under float64']} where it is float64; "
                "Autocast.convert_output gives them in torch's default dtype"
            )
        kinds = (output["int"].dtype, output["bool"].dtype, output["pair"].second.dtype)
        assert kinds == (torch.int64, torch.bool, torch.int64), (
            f"{kit.title}: integers and booleans come out of the model as {kinds}; "
            "Precision.convert_output converts floating-point tensors alone"
        )
        rest = (output["text"], output["deep"][1][1], type(output["pair"]).__name__)
        assert rest == ("kept", 1, "Pair"), (
            f"{kit.title}: what is no tensor comes out of the model as {rest} "
            "(Precision.convert_output)"
        )

    def test_outputs_are_good_for_a_loss(self, kit: PrecisionKit) -> None:
        """A model that does not train gives what plain torch gives in float64, and no gradients."""
        output, gradients = kit.once(rounding.evaluate)[0]
        with torch.no_grad():
            right = build("plain", SEED).double()(Samples(BATCH).x.double())
        assert kit.near(output, right), (
            f"{kit.title}: the output of a model is {_gap(output, right):.3g} away from "
            f"that of float64 (tolerance {kit.tolerance:g})"
        )
        assert not gradients, f"{kit.title}: a model that does not train got gradients"

    # -- the context of forward ------------------------------------------------------------------

    def test_the_context_nests(self, kit: PrecisionKit) -> None:
        """``Precision.forward_context`` may be entered inside another one of the same kind."""
        told = kit.once(rounding.enter_contexts)[0]
        for where in ("twice", "once again"):
            assert told[where] == told["inside"], (
                f"{kit.title}: computation, new tensors and torch's default are "
                f"{told['inside']} in its context, and {told[where]} where it was entered "
                f"{where} (Precision.forward_context)"
            )

    def test_the_context_ends(self, kit: PrecisionKit) -> None:
        """``Precision.forward_context`` leaves no trace, behind an error neither."""
        told = kit.once(rounding.enter_contexts)[0]
        for where in ("behind", "behind an error"):
            assert told[where] == told["before"], (
                f"{kit.title}: computation, new tensors and torch's default are "
                f"{told['before']} before its context, and {told[where]} {where} it "
                "(Precision.forward_context)"
            )

    def test_the_context_may_be_entered_in_any_thread(self, kit: PrecisionKit) -> None:
        """``Precision.forward_context``; that of an ``Autocast`` in several at a time."""
        told = kit.once(rounding.enter_contexts)[0]
        assert told["in a thread"] == told["inside"], (
            f"{kit.title}: computation, new tensors and torch's default are {told['inside']} "
            f"in its context, and {told['in a thread']} in another thread "
            "(Precision.forward_context)"
        )
        assert told["behind a thread"] == told["before"], (
            f"{kit.title}: its context in another thread left {told['behind a thread']} "
            f"behind, where there was {told['before']} (Precision.forward_context)"
        )
        if told["autocast"]:
            found = [
                told[where]
                for where in ("beside a thread", "inside, beside a thread", "still in a thread")
            ]
            right = [told["before"], told["inside"], told["inside"]]
            assert found == right, (
                f"{kit.title}: two threads that are in its context at a time have {found} in "
                f"place of {right} (Autocast.forward_context)"
            )

    def test_the_process_is_left_as_it_was(self, kit: PrecisionKit) -> None:
        """torch's default dtype and autocast outside of ``forward``, behind an error too."""
        for where, found in kit.once(rounding.leave_as_found)[0]:
            assert found == ("float32", "float32", "float32"), (
                f"{kit.title}: behind {where} a product of 32-bit tensors, a new tensor and "
                f"torch's default dtype are {found}; a Precision changes them inside of "
                "forward_context() alone"
            )

    # -- training --------------------------------------------------------------------------------

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_it_trains_as_float64_does(self, kit: PrecisionKit, optimizer: str) -> None:
        """Losses and parameters of plain torch in float64, within the tolerance."""
        told = kit.once(rounding.train, optimizer)
        right = rounding.plain_steps(optimizer, range(STEPS))
        assert all(told[0].moved), (
            f"{kit.title}: a step changed no parameter, however often it was tried (Precision.step)"
        )
        for step, wanted in enumerate(right.losses):
            loss = _mean([rank.losses[step] for rank in told])
            assert kit.near(loss, wanted), (
                f"{kit.title}, {optimizer}: the loss of step {step} is {loss:.7g}, and "
                f"{wanted:.7g} in float64 (tolerance {kit.tolerance:g})"
            )
        kit.check([rank.values for rank in told], right.values, optimizer)

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_the_loss_goes_down(self, kit: PrecisionKit, optimizer: str) -> None:
        """Steps do not vanish in rounding."""
        told = kit.once(rounding.train, optimizer)
        losses = [_mean([rank.losses[step] for rank in told]) for step in range(STEPS)]
        assert sum(losses[-2:]) < sum(losses[:2]), (
            f"{kit.title}, {optimizer}: the loss does not go down: {losses}"
        )

    def test_gradients_accumulate(self, kit: PrecisionKit) -> None:
        """Two micro-batches make the step of one batch."""
        right = rounding.plain_steps("momentum", range(2)).values
        for micro in (1, 2):
            told = kit.once(rounding.accumulate, micro)
            kit.check(told, right, f"{micro} micro-batches to a step")

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_gradients_are_forgotten(self, kit: PrecisionKit, set_to_none: bool) -> None:
        """``Precision.zero_grad``: a step that was left out has no part in the next one."""
        told = kit.once(rounding.forget, set_to_none)
        what = f"zero_grad(set_to_none={set_to_none})"
        for mine in told:
            forgotten = mine["largest"] == 0 and not (set_to_none and mine["left"])
            assert forgotten, (
                f"{kit.title}: {what} left {mine['left']} gradients, up to "
                f"{mine['largest']:.3g} (Precision.zero_grad)"
            )
        right = rounding.plain_steps("sgd", (0, 2)).values
        kit.check([m["values"] for m in told], right, what)

    # -- gradients -------------------------------------------------------------------------------

    def test_clipping_sees_true_gradients(self, kit: PrecisionKit) -> None:
        """``Precision.unscale``: the norm is that of float64, and what is stepped is clipped."""
        told = kit.once(rounding.clip, _LOOSE, _TIGHT)
        if "cannot" in told[0]:
            pytest.skip(f"strategy '{self.strategy}' cannot clip by norm: {told[0]['cannot']}")
        right = rounding.plain_steps("sgd", (0,)).gradients[0]
        for rank, mine in enumerate(told):
            first, again, clipped = mine["norms"]
            assert kit.near(first / right, 1.0), (
                f"{kit.title}: clip_gradients returned the norm {first:.7g} in rank {rank}, "
                f"and it is {right:.7g} in float64; Precision.unscale makes gradients the true "
                "ones before they are clipped"
            )
            assert abs(again - first) <= _SAME * first, (
                f"{kit.title}: clip_gradients returned {first:.7g}, and {again:.7g} when it "
                "was called again before the step; Precision.unscale leaves true gradients alone"
            )
            # torch adds a millionth to the norm by which it divides.
            assert abs(clipped / _TIGHT - 1) <= kit.rough, (
                f"{kit.title}: the norm is {clipped:.7g} after gradients were clipped to "
                f"{_TIGHT} (Precision.unscale)"
            )
            assert abs(mine["step"] / _TIGHT - 1) <= kit.rough, (
                f"{kit.title}: a step of rate 1 went {mine['step']:.7g} far with gradients "
                f"that were clipped to {_TIGHT}; Precision.step does not divide again what "
                "Precision.unscale divided"
            )
            assert mine["scalar"] == [()] * 3, f"{kit.title}: norms of shape {mine['scalar']}"

    def test_unscaling_twice_changes_nothing(self, kit: PrecisionKit) -> None:
        """``Precision.unscale`` is called before clipping, so perhaps more than once."""
        for once, *again in kit.once(rounding.unscale):
            assert again == [once, once], (
                f"{kit.title}: the gradients' norm is {once:.7g} after Precision.unscale, and "
                f"{again} after further calls, which change nothing"
            )

    def test_a_plain_backward_is_right_or_refused(self, kit: PrecisionKit) -> None:
        """``Precision.scales_loss``: whether a loss must pass through ``fabric.backward``."""
        for told in kit.once(rounding.backward_plainly):
            if told["needed"]:
                assert "fabric.backward(loss)" in told["refused"], (
                    f"{kit.title}: loss.backward() was not refused, and scales_loss says that "
                    "it would be wrong (Precision.scales_loss)"
                )
                continue
            assert not told["refused"], (
                f"{kit.title}: a backward was refused, and scales_loss says that none is wrong: "
                f"{told['refused']} (Precision.scales_loss)"
            )
            through, plain = told["fabric.backward(loss)"], told["loss.backward()"]
            assert all(torch.equal(through[name], plain[name]) for name in through), (
                f"{kit.title}: loss.backward() and fabric.backward(loss) lead to different "
                "steps; a precision for which that is so declares scales_loss = True "
                "(Precision.scales_loss)"
            )

    # -- overflow --------------------------------------------------------------------------------

    @pytest.mark.parametrize("clipped", [False, True], ids=["not clipped", "clipped"])
    @pytest.mark.parametrize("how", ["loss", "input"])
    def test_a_step_that_overflows_is_skipped(
        self, kit: PrecisionKit, how: str, clipped: bool
    ) -> None:
        """``Precision.step``: parameters stay, and so does the optimizer's state."""
        if not kit.scales_loss:
            pytest.skip(f"{kit.title} does not scale the loss")
        for rank, told in enumerate(kit.once(rounding.overflow, how, clipped)):
            for name, before in told["before"].items():
                assert torch.equal(told["skipped"][name], before), (
                    f"{kit.title}: a step with an infinite {how} changed parameter '{name}' in "
                    f"rank {rank}; Precision.step skips a step whose gradients overflowed"
                )
            assert told["told"].moved == [True, True], (
                f"{kit.title}: no step was made after one with an infinite {how} (Precision.step)"
            )
            right = rounding.plain_steps("adamw", (0, 2)).values
            what = f"behind a step with an infinite {how}"
            kit.check([told["told"].values], right, what)

    # -- the step --------------------------------------------------------------------------------

    def test_a_step_returns_what_the_optimizer_returns(self, kit: PrecisionKit) -> None:
        """``Precision.step``."""
        for found in kit.once(rounding.returned):
            assert found == "what the optimizer returned", (
                f"{kit.title}: optimizer.step() returned {found!r} in place of what the "
                "optimizer's own step returns (Precision.step)"
            )

    def test_a_closure_works_or_is_refused(self, kit: PrecisionKit) -> None:
        """``Precision.step(optimizer, closure)``; one that may skip a step may refuse."""
        right = rounding.plain_steps("sgd", (0,))
        told = kit.once(rounding.closure)
        for mine in told:
            if mine["refused"]:
                assert kit.scales_loss, (
                    f"{kit.title}: a closure was refused: {mine['refused']}; a precision that "
                    "does not scale the loss passes it on (Precision.step)"
                )
                assert "closure" in mine["refused"], (
                    f"{kit.title}: a closure was refused in words that do not name it: "
                    f"{mine['refused']}"
                )
                continue
            assert mine["losses"], f"{kit.title}: the closure was not called (Precision.step)"
            assert mine["result"] == mine["losses"][0], (
                f"{kit.title}: optimizer.step(closure) returned {mine['result']} and the "
                f"closure's loss is {mine['losses'][0]} (Precision.step)"
            )
        if not told[0]["refused"]:
            what = "a step with a closure"
            kit.check([m["values"] for m in told], right.values, what)

    # -- checkpoints -----------------------------------------------------------------------------

    def test_a_checkpoint_goes_on_as_if_nothing_had_been(self, kit: PrecisionKit) -> None:
        """``Precision.state_dict``: the next steps, and how gradients are scaled in them."""
        path, whole = kit.saved()
        loaded = kit.once(rounding.go_on, path)
        for rank, (right, found) in enumerate(zip(whole, loaded, strict=True)):
            who = f"{kit.title}, rank {rank}: behind a checkpoint"
            for what in ("losses", "gradients"):
                pairs = list(zip(getattr(found, what), getattr(right, what), strict=True))
                assert all(_same(*pair) for pair in pairs), (
                    f"{who} the {what} (loaded, uninterrupted) are {pairs}; Precision.state_dict "
                    "holds what the next step needs to be the same, and load_state_dict restores it"
                )
            assert found.moved == right.moved, f"{who} other steps are skipped: {found.moved}"

    def test_its_state_is_of_plain_values(self, kit: PrecisionKit) -> None:
        """``Precision.state_dict``: ``torch.load(weights_only=True)`` reads it."""
        torch.load(kit.saved()[0], weights_only=True)
        state = kit.once(rounding.read)[0]
        strange = sorted(_strange(state))
        assert isinstance(state, dict), f"{kit.title}: state_dict() returned {state!r}"
        assert not strange, (
            f"{kit.title}: state_dict() holds {', '.join(strange)}; Precision.state_dict "
            "returns plain values only"
        )

    def test_checkpoints_of_other_precisions(self, kit: PrecisionKit) -> None:
        """32-bit goes on from its checkpoint, and it from that of 32-bit."""
        right = rounding.plain_steps("adamw", range(STEPS)).losses[3:]
        other = {"precision": "32-true"}
        for saves, loads in (({}, other), (other, {})):
            path, _ = kit.saved(**saves)
            told = kit.once(rounding.go_on, path, **loads)
            taken = [i for i, moved in enumerate(told[0].moved) if moved]
            assert taken, f"{kit.title}: no step is made behind a checkpoint of another one"
            # Where a new scale begins too large, the first steps are skipped.
            if len(taken) == len(right):
                for i in taken:
                    loss = _mean([rank.losses[i] for rank in told])
                    assert kit.near(loss, right[i], kit.rough), (
                        f"{kit.title}: behind a checkpoint, saved with {saves or 'itself'} and "
                        f"loaded with {loads or 'itself'}, the loss is {loss:.7g}, and "
                        f"{right[i]:.7g} in float64"
                    )


def _subject(cls: type[PrecisionConformance]) -> Subject:
    accelerator = find(cls, "accelerator")
    if accelerator.count is not None and accelerator.count < cls.devices:
        pytest.skip(
            f"{accelerator.title}: {cls.devices} devices are needed, {accelerator.count} here"
        )
    return find(cls, "precision", accelerator.spec.device)


def _gap(found: Any, right: Any) -> float:
    """The largest difference."""
    one, other = (torch.as_tensor(value).detach().double() for value in (found, right))
    return float((one - other).abs().max().item())


def _by_dtypes(formats: Any) -> float:
    """The tolerance for what parameters and computation are rounded to."""
    dtypes = (*formats["setup"], formats["computed"])
    eps = max(torch.finfo(getattr(torch, name)).eps for name in dtypes)
    if eps < 1e-12:
        return 1e-10
    return 1e-5 if eps < 1e-6 else 4 * eps


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _same(found: float, right: float) -> bool:
    """Equal but for the order of a sum, and both not finite alike."""
    return found == right or abs(found - right) <= _SAME * abs(right) or found != found != right


def _strange(state: Any) -> set[str]:
    """The names of types in a state that are not plain."""
    if isinstance(state, dict):
        return {name for pair in state.items() for part in pair for name in _strange(part)}
    if isinstance(state, list | tuple):
        return {name for part in state for name in _strange(part)}
    plain = isinstance(state, int | float | str | bytes | Tensor) or state is None
    return set() if plain else {type(state).__name__}
