"""Whether a strategy is right: training, collectives, checkpoints and failures of real ranks."""

from __future__ import annotations

import difflib
import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from torchweft.api import CAPABILITIES, Strategy
from torchweft.checkpoint.consolidating import consolidate
from torchweft.checkpoint.manifest import Manifest
from torchweft.errors import RankFailed
from torchweft.fabric import Fabric
from torchweft.testing import exchanging, failing, resuming
from torchweft.testing.declared import check_attributes, find
from torchweft.testing.exchanging import DTYPES, OPS, Exchanged
from torchweft.testing.models import Samples, build
from torchweft.testing.ranks import RanksTimeout, environment, run_ranks
from torchweft.testing.training import Case, Trained, alone, train_all
from torchweft.testing.two_models import plain_two, trains_two

__all__ = ["StrategyConformance", "StrategyKit"]

#: Every optimizer, with and without accumulation and clipping.
MATRIX = [
    Case(optimizer=optimizer, accumulate=accumulate, clip=clip)
    for optimizer in ("sgd", "momentum", "adamw")
    for accumulate in (1, 2)
    for clip in ("", "norm", "value")
]

#: Models and loops with a trait that a strategy can get wrong.
TRAITS: Mapping[str, Case] = {
    "groups": Case(optimizer="adamw", groups=True),
    "frozen parameters": Case(model="frozen", optimizer="momentum"),
    "shared parameters": Case(model="shared", optimizer="adamw", clip="norm"),
    "a module used twice": Case(model="twice", optimizer="momentum", accumulate=2),
    "unused parameters": Case(model="unused", optimizer="adamw"),
    "buffers": Case(model="buffers", optimizer="adamw"),
    "an uneven last batch": Case(optimizer="momentum", samples=22),
    "an uneven last group": Case(accumulate=2, samples=36, epochs=1, clip="norm"),
    "no_backward_sync": Case(optimizer="adamw", accumulate=3, unsynced=True, clip="norm"),
    "set up apart": Case(optimizer="momentum", apart=True),
    "init_module": Case(optimizer="momentum", empty=True),
    "a scheduler": Case(optimizer="adamw", scheduled=True),
    "a method in place of forward": Case(model="method", method=True),
    "gradients zeroed in place": Case(optimizer="momentum", keep_grads=True),
    "models that differ between ranks": Case(model="buffers", differing=True),
}

#: Enough to see on fewer devices that a number of devices is not built in.
FEW = {"sgd": Case(), "adamw": Case(optimizer="adamw", accumulate=2, clip="norm")}


def _label(case: Case) -> str:
    clipped = f"clipped by {case.clip}" if case.clip else "not clipped"
    return f"{case.optimizer}, {case.accumulate} to a step, {clipped}"


class StrategyKit:
    """What the tests of one class share: its plan, and what its ranks have answered already."""

    def __init__(self, cls: type[StrategyConformance]) -> None:
        self.cls = cls
        self._answers: dict[Any, Any] = {}
        self._plans: dict[int, Fabric] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="torchweft-kit-")

    def close(self) -> None:
        """Remove what was saved."""
        self.folder.cleanup()

    # -- what it is ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What to call it in a sentence."""
        asked = self.cls.strategy
        return f"strategy '{asked if isinstance(asked, str) else type(asked).__name__}'"

    def fabric(self, devices: int) -> Fabric:
        """A Fabric that is never launched, for its plan; skips where there is no such device."""
        check_attributes(self.cls)
        if not self.cls.strategy:
            pytest.fail(f"{self.cls.__name__} names no strategy; write strategy = 'NAME' in it")
        if devices not in self._plans:
            self._check_devices(devices)
            with environment(self._environ(devices)):
                self._plans[devices] = Fabric(devices=devices, **self._arguments())
        return self._plans[devices]

    def _environ(self, devices: int) -> dict[str, str]:
        """The variables that the class names, for a run on so many devices."""
        named = self.cls.environ.items()
        return {name: value.replace("{devices}", str(devices)) for name, value in named}

    def _arguments(self) -> dict[str, Any]:
        cls = self.cls
        return {
            "accelerator": cls.accelerator,
            "strategy": cls.strategy,
            "precision": cls.precision,
            "launcher": "forkserver",
        }

    @property
    def tried(self) -> tuple[int, ...]:
        """The numbers of devices that the class names; one number is a number too."""
        devices: Any = self.cls.devices
        return (devices,) if isinstance(devices, int) else tuple(sorted(devices))

    def _check_devices(self, devices: int) -> None:
        """Skip where this machine has no such device, or fewer; never for the strategy's sake."""
        with environment(self._environ(devices)):
            here = find(self.cls, "accelerator")
        if here.count is not None and here.count < devices:
            pytest.skip(f"{here.title}: {devices} devices are needed, and there are {here.count}")

    def worlds(self) -> tuple[int, ...]:
        """The numbers of devices that it can be asked to use."""
        smallest = self.fabric(min(self.tried))
        one = smallest.plan.strategy.processes == "one"
        return (1,) if one else self.tried

    @property
    def largest(self) -> int:
        """The most devices."""
        return self.worlds()[-1]

    @property
    def cannot(self) -> Mapping[str, str]:
        """What the strategy itself says that it cannot do."""
        return self.fabric(min(self.tried)).strategy.cannot

    def need(self, *capabilities: str) -> None:
        """Skip, with the strategy's own reason, where it cannot."""
        for name in capabilities:
            if name in self.cannot:
                pytest.skip(f"{self.name} cannot: {CAPABILITIES[name]}: {self.cannot[name]}")

    def need_several(self) -> int:
        """The most processes; skips where the strategy is one process."""
        self.fabric(self.largest)
        size = self._plans[self.largest].plan.topology.world_size
        if size == 1:
            pytest.skip(f"{self.name} is one process")
        return size

    # -- running ---------------------------------------------------------------------------------

    def run(self, devices: int, function: Any, *args: Any, **instead: Any) -> list[Any]:
        """What each rank answers."""
        # Another strategy in its place may run on a number of devices that this one cannot.
        if "strategy" in instead:
            self._check_devices(devices)
        else:
            self.fabric(devices)
        arguments = self._arguments()
        del arguments["launcher"]
        arguments.update(timeout=self.cls.timeout, environ=self._environ(devices))
        return run_ranks(devices, function, *args, **{**arguments, **instead})

    def once(self, devices: int, function: Any, *args: Any) -> list[Any]:
        """The same, asked once for all tests."""
        key = (devices, function, args)
        if key not in self._answers:
            self._answers[key] = self.run(devices, function, *args)
        return list(self._answers[key])

    def path(self, name: str) -> Path:
        """A file that ranks may write."""
        return Path(self.folder.name) / name

    # -- training --------------------------------------------------------------------------------

    def train_alone(self, devices: int, case: Case) -> list[Trained]:
        """Each rank's account of one case in a run of its own."""
        if "hung" in self._answers:
            pytest.fail(
                f"not tried: ranks hung before, and would take {self.cls.timeout:g} s each time. "
                f"{self._answers['hung']}",
                pytrace=False,
            )
        try:
            return self._train_alone(devices, case)
        except RanksTimeout as error:
            self._answers["hung"] = f"{self.name}, {case}: {str(error).partition(chr(10) * 2)[0]}"
            raise

    def _train_alone(self, devices: int, case: Case) -> list[Trained]:
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder:
            return [told[0] for told in self.run(devices, train_all, [case], Path(folder))]

    def trained(self, devices: int, case: Case) -> tuple[list[Trained], bool]:
        """Each rank's account, and whether other models were trained in the same run before.

        All cases are trained in one run, which saves most of the time. Where that fails, or the
        strategy takes one model alone, each has a run of its own.
        """
        cases = self._together(devices)
        if case not in cases or "several_modules" in self.cannot:
            return self.train_alone(devices, case), False
        key = ("together", devices)
        if key not in self._answers:
            self._answers[key] = self._train_together(devices, cases)
        if case not in self._answers[key]:
            return self.train_alone(devices, case), False
        return self._answers[key][case], True

    def _together(self, devices: int) -> list[Case]:
        cases = [*MATRIX, *TRAITS.values()] if devices == self.largest else list(FEW.values())
        cannot = set(self.cannot)
        return [case for case in cases if cannot.isdisjoint(case.needs)]

    def _train_together(self, devices: int, cases: list[Case]) -> dict[Case, list[Trained]]:
        with tempfile.TemporaryDirectory(dir=self.folder.name) as folder:
            try:
                answers = self.run(devices, train_all, cases, Path(folder))
            except (RankFailed, RanksTimeout):
                # Which of them it was is found out with each alone.
                return {}
        return dict(zip(cases, zip(*answers, strict=True), strict=True))  # type: ignore[arg-type]

    def check(self, devices: int, case: Case) -> None:
        """Compare with one process; fails with the first thing that is wrong."""
        told, among_others = self.trained(devices, case)
        wrong = self.wrong(told, case)
        if wrong and among_others and self._leaks(devices, case):
            wrong += (
                ". In a run of its own the same model trains right: something of the models that "
                "were trained before it is left. Keep what belongs to a model or an optimizer "
                "with it, or declare cannot = {'several_modules': …}"
            )
        if wrong:
            pytest.fail(wrong, pytrace=False)

    def _leaks(self, devices: int, case: Case) -> bool:
        """Whether a case that went wrong among others goes right alone; tried with one of them."""
        key = ("leaks", devices)
        if key not in self._answers:
            self._answers[key] = not self.wrong(self.train_alone(devices, case), case)
        return bool(self._answers[key])

    def wrong(self, told: Sequence[Trained], case: Case) -> str:
        """The first difference from one process, in a sentence; empty where there is none."""
        expected = alone(case, [rank.seen for rank in told])
        what = f"{self.name}, {case}"
        # In the order in which they come: the first that is wrong is next to the cause.
        for i, step in enumerate(expected.steps):
            for rank, mine in enumerate(told):
                loss, right = mine.losses[i], expected.losses[rank][i]
                if self.far(loss, right):
                    stepped = any(each is not None for each in expected.steps[:i])
                    return (
                        f"{what}: the loss of micro-batch {i} is {loss:.7g} in rank {rank}, and "
                        f"one process has {right:.7g} on the same batches (tolerance "
                        f"{self.cls.tolerance:g}): {_why(case, stepped)}"
                    )
                if step is None or case.clip != "norm":
                    continue
                norm, whole = mine.norms[step], expected.norms[step]
                if self.far(norm, whole):
                    return (
                        f"{what}: clip_gradients returned the norm {norm:.7g} in rank {rank} "
                        f"behind micro-batch {i}, and the global norm of the mean of all ranks' "
                        f"gradients is {whole:.7g}{_ratio(norm, whole, len(told))}; Strategy.clip "
                        "comes after their reduction and returns the norm that one process has"
                    )
        named = dict(expected.model.named_parameters(remove_duplicate=False))
        missing = sorted(set(named) - set(told[0].state))
        if missing:
            return (
                f"{what}: its checkpoint has no {', '.join(missing)}, but "
                f"{', '.join(told[0].state)}; Strategy.module_state gives the names of the user's "
                "own module"
            )
        for name, parameter in named.items():
            found, aim = told[0].state[name], parameter.detach()
            gap = (found.double() - aim).abs().max().item()
            if self.far(gap, 0.0, aim):
                return (
                    f"{what}: parameter '{name}' ends {gap:.3g} away from where one "
                    f"process ends (tolerance {self.cls.tolerance:g})"
                )
        return ""

    def far(self, found: float, right: float, scale: Tensor | None = None) -> bool:
        """Whether a number is further off than the tolerance, relative where it is large."""
        largest = abs(right) if scale is None else scale.abs().max().item()
        # Written so that nan is far.
        return not abs(found - right) <= self.cls.tolerance * max(1.0, largest)

    # -- checkpoints -----------------------------------------------------------------------------

    def saved(self, devices: int, optimizer: str, single: bool = False) -> tuple[Path, list[Any]]:
        """A checkpoint of this strategy, or of one process, and what its ranks saw.

        Beside the file there is a folder, under the same name without the suffix.
        """
        key = ("saved", devices, optimizer, single)
        if key not in self._answers:
            path = self.path(f"{optimizer}-{devices}-{'single' if single else 'own'}.ckpt")
            instead = {"strategy": "single_device"} if single else {}
            arguments = (resuming.train_on, optimizer, None, path)
            self._answers[key] = path, self.run(devices, *arguments, **instead)
        found: tuple[Path, list[Any]] = self._answers[key]
        return found

    def loaded(self, devices: int, optimizer: str, path: Path, single: bool = False) -> list[Any]:
        """What ranks see that go on from a checkpoint."""
        instead = {"strategy": "single_device"} if single else {}
        return self.run(devices, resuming.train_on, optimizer, path, None, **instead)

    def compare(self, told: list[Any], optimizer: str, first: int, what: str) -> None:
        """Whether the mean of the ranks' losses is what one process has without an interruption."""
        right = resuming.plain_losses(optimizer)
        steps = sorted(told[0]["losses"])
        assert steps == list(range(first, resuming.STEPS)), (
            f"{self.name}, {what}: it goes on with step {steps[:1]}, and {first} comes next"
        )
        for step in steps:
            loss = sum(rank["losses"][step] for rank in told) / len(told)
            assert not self.far(loss, right[step]), (
                f"{self.name}, {what}: the loss of step {step} is {loss:.7g}, and "
                f"{right[step]:.7g} where one process trains without an interruption (tolerance "
                f"{self.cls.tolerance:g}); see Strategy.module_state, .optimizer_state and their "
                "loaders"
            )


class StrategyConformance:
    """Whether a strategy trains as one process would. Subclass it in a test file.

    ::

        class TestMine(StrategyConformance):
            strategy = "mine"

    What a strategy cannot do is read from its ``cannot``; nothing else is left out.

    Attributes:
        strategy: its name, with options as a user writes them (``"mine:period=4"``), or a
            ``Strategy``.
        accelerator: on which devices; without them every test is skipped.
        precision: with which number formats.
        devices: how many devices to try; the larger number has most of the tests.
        tolerance: how far losses, norms and parameters may be from those of one process that
            computes in float64; relative for numbers above 1.
        timeout: seconds for each run of ranks.
        environ: variables for the plan and the ranks; in a value ``{devices}`` stands for how
            many are tried.
    """

    strategy: ClassVar[str | Strategy] = ""
    accelerator: ClassVar[str] = "cpu"
    precision: ClassVar[str] = "32-true"
    devices: ClassVar[tuple[int, ...]] = (1, 2)
    tolerance: ClassVar[float] = 1e-5
    timeout: ClassVar[float] = 60.0
    environ: ClassVar[Mapping[str, str]] = {}

    # -- what it says of itself ------------------------------------------------------------------

    def test_what_it_cannot_do_is_known_and_has_a_reason(self, strategy_kit: StrategyKit) -> None:
        """``cannot`` names known capabilities, each with a reason."""
        for name, reason in strategy_kit.cannot.items():
            assert name in CAPABILITIES, (
                f"{strategy_kit.name} declares that it cannot '{name}'; known are "
                f"{', '.join(CAPABILITIES)}"
            )
            assert reason.strip(), f"{strategy_kit.name} says no reason for '{name}' in cannot"

    def test_what_it_cannot_do_is_refused_with_its_reason(self, strategy_kit: StrategyKit) -> None:
        """A user who asks for what is in ``cannot`` is told the reason."""
        for capability in failing.REFUSED:
            if capability in strategy_kit.cannot:
                with pytest.raises(RankFailed, match=re.escape(strategy_kit.cannot[capability])):
                    strategy_kit.run(strategy_kit.largest, failing.refused, capability)

    def test_every_process_feeds_replicas_of_its_own(self, strategy_kit: StrategyKit) -> None:
        """``shard``: together the processes feed every replica, by as many as share it."""
        for devices in strategy_kit.worlds():
            told = strategy_kit.once(devices, _shard_of)
            fed = [replica for shard in told for replica in shard["feeds"]]
            replicas = {shard["replicas"] for shard in told}
            sharing = {shard["processes"] for shard in told}
            assert len(replicas) == len(sharing) == 1, (
                f"{strategy_kit.name}: ranks disagree how many replicas there are, or by how many "
                f"processes each is shared: {replicas}, {sharing}"
            )
            by = sharing.pop()
            aim = sorted(by * list(range(replicas.pop())))
            assert sorted(fed) == aim, (
                f"{strategy_kit.name} on {devices} devices: the processes feed the replicas "
                f"{[shard['feeds'] for shard in told]}; every replica is fed by "
                f"{by if by > 1 else 'one'} process{'es' if by > 1 else ''} "
                "(Strategy.shard; its default is right for one process alone)"
            )

    def test_no_member_is_misspelt(self, strategy_kit: StrategyKit) -> None:
        """A method close to one of the base class's, but not it, would never be called."""
        cls = type(strategy_kit.fabric(strategy_kit.largest).strategy)
        members = [name for name in dir(Strategy) if not name.startswith("_")]
        own = {name for each in cls.__mro__[:-1] for name in vars(each)}
        for name in sorted(own - set(dir(Strategy))):
            near = difflib.get_close_matches(name, members, n=1, cutoff=0.8)
            if near and callable(getattr(cls, name, None)) and not name.startswith("_"):
                pytest.fail(
                    f"{cls.__name__}.{name} is no member of Strategy, and so never called; did "
                    f"you mean '{near[0]}'? A method of its own takes another name, or one with "
                    "an underscore",
                    pytrace=False,
                )

    # -- training --------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", MATRIX, ids=_label)
    def test_it_trains_as_one_process_does(self, strategy_kit: StrategyKit, case: Case) -> None:
        """Losses, norms and final parameters, on the largest number of devices."""
        strategy_kit.need(*case.needs)
        strategy_kit.check(strategy_kit.largest, case)

    @pytest.mark.parametrize("trait", TRAITS)
    def test_it_trains_with(self, strategy_kit: StrategyKit, trait: str) -> None:
        """The same, of models and loops with a trait that is easy to get wrong."""
        strategy_kit.need(*TRAITS[trait].needs)
        strategy_kit.check(strategy_kit.largest, TRAITS[trait])

    @pytest.mark.parametrize("few", FEW)
    def test_it_trains_on_fewer_devices(self, strategy_kit: StrategyKit, few: str) -> None:
        """The same, on every smaller number of devices."""
        strategy_kit.need(*FEW[few].needs)
        worlds = strategy_kit.worlds()[:-1]
        if not worlds:
            pytest.skip(f"{strategy_kit.name} is tried on one number of devices")
        for devices in worlds:
            strategy_kit.check(devices, FEW[few])

    def test_a_plain_backward_is_right_or_refused(self, strategy_kit: StrategyKit) -> None:
        """``loss.backward()`` does what ``fabric.backward(loss)`` does, or is an error."""
        case = Case(plain=True)
        fabric = strategy_kit.fabric(strategy_kit.largest)
        if fabric.strategy.owns_backward or fabric.precision.scales_loss:
            with pytest.raises(RankFailed, match=r"needs fabric\.backward\(loss\) in its place"):
                strategy_kit.train_alone(strategy_kit.largest, case)
            return
        wrong = strategy_kit.wrong(strategy_kit.train_alone(strategy_kit.largest, case), case)
        assert not wrong, (
            f"{wrong}. Only fabric.backward(loss) is right with this strategy: set owns_backward = "
            "True, so that a user is told"
        )

    def test_two_models_take_turns(self, strategy_kit: StrategyKit) -> None:
        """Two models with optimizers of their own, as in a GAN."""
        strategy_kit.need("several_modules")
        told = strategy_kit.run(strategy_kit.largest, trains_two)
        for which, right in enumerate(plain_two()):
            for step, loss in enumerate(right):
                found = sum(rank[which][step] for rank in told) / len(told)
                assert not strategy_kit.far(found, loss), (
                    f"{strategy_kit.name}: of two models that take turns the "
                    f"{('second', 'first')[which]} has the loss {found:.7g} in step {step}, and "
                    f"{loss:.7g} where one process trains them"
                )

    # -- data ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("samples", [24, 22], ids=["even", "uneven"])
    def test_every_sample_is_seen(self, strategy_kit: StrategyKit, samples: int) -> None:
        """In an epoch all processes together see every sample, and none twice but to fill up."""
        case = Case() if samples == 24 else TRAITS["an uneven last batch"]
        told, _ = strategy_kit.trained(strategy_kit.largest, case)
        fabric = strategy_kit.once(strategy_kit.largest, _shard_of)
        steps = {len(rank.seen) for rank in told}
        assert len(steps) == 1, (
            f"{strategy_kit.name}: the ranks took {sorted(steps)} steps; all take the same number"
        )
        per_epoch = steps.pop() // case.epochs
        seen = [i for rank in told for batch in rank.seen[:per_epoch] for i in batch]
        replicas, sharing = fabric[0]["replicas"], fabric[0]["processes"]
        padded = -(-samples // replicas) * replicas * sharing
        assert sorted(set(seen)) == list(range(samples)), (
            f"{strategy_kit.name}: the samples {sorted(set(range(samples)) - set(seen))} are seen "
            "by no process (Strategy.shard, .move)"
        )
        assert len(seen) == padded, (
            f"{strategy_kit.name}: {samples} samples are seen {len(seen)} times in an epoch of "
            f"{replicas} replicas: every process sees all of them. Strategy.shard says which "
            "replicas a process feeds; its default is for one process alone"
        )

    @pytest.mark.parametrize("trait", ["buffers", "models that differ between ranks"])
    def test_all_ranks_evaluate_as_the_checkpoint_does(
        self, strategy_kit: StrategyKit, trait: str
    ) -> None:
        """After training every rank's model, buffers included, is the one that was saved."""
        case = TRAITS[trait]
        strategy_kit.need(*case.needs)
        told, _ = strategy_kit.trained(strategy_kit.largest, case)
        model = build(case.model, 0)
        model.load_state_dict({name: value.float() for name, value in told[0].state.items()})
        with torch.no_grad():
            right = model.eval()(Samples(case.samples).x)
        for rank, mine in enumerate(told):
            gap = (mine.output - right).abs().max().item()
            if strategy_kit.far(gap, 0.0, right):
                pytest.fail(
                    f"{strategy_kit.name}: in rank {rank} the trained model evaluates to numbers "
                    f"that are {gap:.3g} away from those of its checkpoint; parameters and buffers "
                    "(running statistics too) are the same in every rank, as those of rank 0 "
                    "where ranks made them differently",
                    pytrace=False,
                )

    # -- collectives -----------------------------------------------------------------------------

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_reduce(self, strategy_kit: StrategyKit, dtype: str, op: str) -> None:
        """Equals its definition; integers stay integers but under ``"mean"``."""
        told = _exchanged(strategy_kit, dtype)
        stacked = _stack(len(told), dtype)
        right = _reduced(stacked, op)
        for rank, mine in enumerate(told):
            found = mine.reduced[dtype, op]
            assert _close(found, right), (
                f"{strategy_kit.name}: all_reduce({dtype}, '{op}') gave rank {rank} {found}, and "
                f"by its definition it is {right} (Collectives.all_reduce)"
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_all_gather(self, strategy_kit: StrategyKit, dtype: str) -> None:
        """All ranks' tensors, stacked in the order of ranks."""
        told = _exchanged(strategy_kit, dtype)
        right = _stack(len(told), dtype)
        for rank, mine in enumerate(told):
            found = mine.gathered[dtype]
            assert _same(found, right), (
                f"{strategy_kit.name}: all_gather({dtype}) gave rank {rank} {found}, and by its "
                f"definition it is {right} (Collectives.all_gather)"
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_broadcast_of_a_tensor(self, strategy_kit: StrategyKit, dtype: str) -> None:
        """The tensor of every source, in every rank."""
        told = _exchanged(strategy_kit, dtype)
        for src, right in enumerate(_stack(len(told), dtype)):
            for rank, mine in enumerate(told):
                found = mine.broadcast[dtype, src]
                assert _same(found, right), (
                    f"{strategy_kit.name}: broadcast({dtype}, src={src}) gave rank {rank} {found}, "
                    f"and rank {src} has {right} (Collectives.broadcast)"
                )

    def test_broadcast_of_objects(self, strategy_kit: StrategyKit) -> None:
        """Whatever can be pickled, small, large and None."""
        told = strategy_kit.once(strategy_kit.largest, exchanging.share)
        last = len(told) - 1
        right = exchanging.objects(last)
        for rank, mine in enumerate(told):
            assert _same(mine["objects"], right), (
                f"{strategy_kit.name}: broadcast of objects gave rank {rank} {mine['objects']}, "
                f"and rank {last} has {right} (Collectives.broadcast)"
            )
            assert (mine["large"], mine["nothing"]) == (1 << 20, None)

    def test_collections_are_reduced_and_gathered(self, strategy_kit: StrategyKit) -> None:
        """Tensors and numbers in dicts, lists and tuples."""
        told = strategy_kit.once(strategy_kit.largest, exchanging.share)
        all_of = [exchanging.nested(rank) for rank in range(len(told))]
        for rank, mine in enumerate(told):
            summed = sum(each["loss"] for each in all_of)
            assert _close(mine["reduced"]["loss"], summed), f"rank {rank}: {mine['reduced']}"
            parts = torch.stack([each["parts"][0] for each in all_of])
            assert _close(mine["reduced"]["parts"][0], parts.sum(0))
            assert torch.equal(mine["gathered"]["parts"][0], parts)
            numbers = [each["parts"][1][1] for each in all_of]
            assert mine["gathered"]["parts"][1][1].tolist() == numbers
            assert mine["gathered"]["empty"] == []

    def test_gradients_flow_back_through_all_gather(self, strategy_kit: StrategyKit) -> None:
        """``sync_grads=True``: to the rank that each part came from, those of all ranks summed."""
        told = strategy_kit.once(strategy_kit.largest, exchanging.share)
        size = len(told)
        weights = torch.arange(1.0, 1 + 3 * size).reshape(size, 3)
        for rank, mine in enumerate(told):
            right = weights[rank] * sum(range(1, size + 1))
            assert _close(mine["gradient"], right), (
                f"{strategy_kit.name}: the gradient through all_gather(sync_grads=True) is "
                f"{mine['gradient']} in rank {rank}, and by its definition {right}"
            )

    def test_a_barrier_holds(self, strategy_kit: StrategyKit) -> None:
        """Nobody passes before everybody has come."""
        strategy_kit.need_several()
        told = strategy_kit.once(strategy_kit.largest, exchanging.share)
        last = max(mine["arrived"] for mine in told)
        early = [rank for rank, mine in enumerate(told) if mine["passed"] < last]
        assert not early, (
            f"{strategy_kit.name}: the ranks {early} passed a barrier before all had come "
            "(Collectives.barrier)"
        )

    # -- checkpoints -----------------------------------------------------------------------------

    def test_a_checkpoint_has_the_names_of_the_model(self, strategy_kit: StrategyKit) -> None:
        """Tensors are whole and keyed by the names of the user's own module, and so is state."""
        for devices in strategy_kit.worlds():
            told = strategy_kit.saved(devices, "adamw")[1][0]
            right = {name: tuple(v.shape) for name, v in build("plain", 0).state_dict().items()}
            assert told["shapes"] == right, (
                f"{strategy_kit.name} on {devices} devices: a checkpoint holds {told['shapes']}, "
                f"and the model is {right}; see Strategy.module_state"
            )
            assert told["states"] == sorted(right), (
                f"{strategy_kit.name} on {devices} devices: the optimizer's state in a checkpoint "
                f"is keyed by {told['states']}, and the parameters are {sorted(right)}; see "
                "Strategy.optimizer_state"
            )

    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    def test_saving_does_not_disturb(self, strategy_kit: StrategyKit, optimizer: str) -> None:
        """Training goes on behind ``save`` as if there had been none."""
        for devices in strategy_kit.worlds():
            told = strategy_kit.saved(devices, optimizer)[1]
            strategy_kit.compare(told, optimizer, 0, f"{optimizer} on {devices} devices")

    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    def test_it_goes_on_from_its_own_checkpoint(
        self, strategy_kit: StrategyKit, optimizer: str
    ) -> None:
        """Saved on every number of devices and loaded on every other, or on the same."""
        worlds = strategy_kit.worlds()
        for here, there in zip(worlds, reversed(worlds), strict=True):
            path, _ = strategy_kit.saved(here, optimizer)
            told = strategy_kit.loaded(there, optimizer, path)
            what = f"{optimizer}, saved on {here} devices, loaded on {there}"
            strategy_kit.compare(told, optimizer, resuming.SAVED_AT, what)

    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    def test_one_process_goes_on_from_its_checkpoint(
        self, strategy_kit: StrategyKit, optimizer: str
    ) -> None:
        """Strategy ``single_device`` loads it."""
        path, _ = strategy_kit.saved(strategy_kit.largest, optimizer)
        told = strategy_kit.loaded(1, optimizer, path, single=True)
        what = f"{optimizer}, saved on {strategy_kit.largest} devices, loaded into single_device"
        strategy_kit.compare(told, optimizer, resuming.SAVED_AT, what)

    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    def test_it_goes_on_from_one_process_s_checkpoint(
        self, strategy_kit: StrategyKit, optimizer: str
    ) -> None:
        """It loads what strategy ``single_device`` saved."""
        path, _ = strategy_kit.saved(1, optimizer, single=True)
        told = strategy_kit.loaded(strategy_kit.largest, optimizer, path)
        what = f"{optimizer}, saved by single_device, loaded on {strategy_kit.largest} devices"
        strategy_kit.compare(told, optimizer, resuming.SAVED_AT, what)

    def test_it_goes_on_from_its_own_folder(self, strategy_kit: StrategyKit) -> None:
        """Each rank wrote its part, and reads what it needs, whatever their numbers.

        In a layout of the strategy's own, the number of devices is the same.
        """
        worlds = strategy_kit.worlds()
        for here, there in zip(worlds, reversed(worlds), strict=True):
            path, _ = strategy_kit.saved(here, "adamw")
            there = here if _layouts(path.with_suffix("")) else there
            told = strategy_kit.loaded(there, "adamw", path.with_suffix(""))
            what = f"adamw, saved on {here} devices as a folder, loaded on {there}"
            strategy_kit.compare(told, "adamw", resuming.SAVED_AT, what)

    def test_folders_pass_between_it_and_one_process(self, strategy_kit: StrategyKit) -> None:
        """Strategy ``single_device`` loads the folder that it saved, and the other way round.

        One in a layout of the strategy's own it refuses, and says with what to read it.
        """
        devices = strategy_kit.largest
        path, _ = strategy_kit.saved(devices, "adamw")
        layouts = _layouts(path.with_suffix(""))
        if layouts:
            with pytest.raises(RankFailed, match=rf"in the layout '{layouts[0]}' of strategy "):
                strategy_kit.loaded(1, "adamw", path.with_suffix(""), single=True)
        else:
            told = strategy_kit.loaded(1, "adamw", path.with_suffix(""), single=True)
            what = f"adamw, saved on {devices} devices as a folder, loaded into single_device"
            strategy_kit.compare(told, "adamw", resuming.SAVED_AT, what)
        path, _ = strategy_kit.saved(1, "adamw", single=True)
        told = strategy_kit.loaded(devices, "adamw", path.with_suffix(""))
        what = f"adamw, saved by single_device as a folder, loaded on {devices} devices"
        strategy_kit.compare(told, "adamw", resuming.SAVED_AT, what)

    def test_a_folder_holds_what_the_file_holds(self, strategy_kit: StrategyKit) -> None:
        """Consolidated, it is the file: names, tensors and everything else.

        One in a layout of the strategy's own is not read by a single process.
        """
        path, _ = strategy_kit.saved(strategy_kit.largest, "adamw")
        if _layouts(path.with_suffix("")):
            pytest.skip("the strategy writes folders in a layout of its own")
        made = strategy_kit.path("consolidated.ckpt")
        consolidate(path.with_suffix(""), made)
        one, other = (torch.load(each, weights_only=True) for each in (path, made))
        different = [key for key in {**one, **other} if not _same(one.get(key), other.get(key))]
        assert not different, (
            f"{strategy_kit.name}: of a checkpoint saved as a folder, {', '.join(different)} "
            "differs from the one saved as a file; see Strategy.module_state and .optimizer_state"
        )

    # -- failures --------------------------------------------------------------------------------

    def test_a_rank_that_raises_ends_the_run(self, strategy_kit: StrategyKit) -> None:
        """The report names the rank and the error, not those who only lost it."""
        devices = strategy_kit.largest
        with pytest.raises(RankFailed) as failed:
            strategy_kit.run(devices, failing.raises)
        last = strategy_kit.fabric(devices).plan.topology.world_size - 1
        words = f"rank {last} of {last + 1} failed: ValueError: this rank has had enough"
        assert str(failed.value).startswith(words), str(failed.value)

    def test_a_rank_that_is_killed_ends_the_run(self, strategy_kit: StrategyKit) -> None:
        """The report names the rank and the signal."""
        devices = strategy_kit.largest
        with pytest.raises(RankFailed) as failed:
            strategy_kit.run(devices, failing.is_killed)
        last = strategy_kit.fabric(devices).plan.topology.world_size - 1
        words = f"rank {last} of {last + 1} failed: killed by signal 9 (SIGKILL)"
        assert str(failed.value).startswith(words), str(failed.value)

    def test_a_rank_that_is_late_for_a_collective_is_found(self, strategy_kit: StrategyKit) -> None:
        """A watchdog tells which rank is missing, and at which line it is."""
        last = strategy_kit.need_several() - 1
        seconds = _watchdog(strategy_kit)
        with pytest.raises(RanksTimeout) as late:
            strategy_kit.run(
                strategy_kit.largest, failing.leaves_out, self.timeout, timeout=seconds
            )
        source, first = inspect.getsourcelines(failing.leaves_out)
        line = first + next(i for i, text in enumerate(source) if "time.sleep" in text)
        lines = str(late.value).splitlines()
        assert f"rank {last}: failing.py, line {line} in leaves_out" in lines, str(late.value)
        waits = re.compile(rf"rank 0: failing\.py, line {line + 1} in leaves_out, in \w+\(\)")
        assert any(waits.fullmatch(text) for text in lines), (
            f"{strategy_kit.name}: rank 0 does not wait for rank {last} in a barrier:\n{late.value}"
        )

    def test_a_rank_that_leaves_others_waiting_is_found(self, strategy_kit: StrategyKit) -> None:
        """Whether the others fail or wait for ever, the report names the rank that is done."""
        last = strategy_kit.need_several() - 1
        with pytest.raises((RankFailed, RanksTimeout)) as late:
            strategy_kit.run(
                strategy_kit.largest, failing.leaves_early, timeout=_watchdog(strategy_kit)
            )
        told = str(late.value)
        assert f"rank {last}: done" in told or f"rank {last}, which was done" in told, told


def _why(case: Case, stepped: bool) -> str:
    """What a loss that is wrong tells, by what had happened before it."""
    if not stepped:
        return (
            "nothing was stepped before it, so that the models differ from the beginning, or the "
            "forward pass computes something else (Strategy.setup gives every rank the parameters "
            "and buffers of rank 0)"
        )
    hint = " after clipping (Strategy.clip)" if case.clip else ""
    hint += " of what Strategy.forward_method ran" if case.method else ""
    return (
        "what was stepped before it is not the mean of all ranks' gradients"
        f"{hint} (Strategy.backward, .accumulating, .step)"
    )


def _ratio(norm: float, whole: float, ranks: int) -> str:
    """What the ratio of two norms gives away."""
    if ranks > 1 and abs(norm - whole * ranks) < 1e-3 * norm:
        return f" (it is {ranks} times that, the number of ranks: summed, and not averaged?)"
    if ranks > 1 and abs(norm * ranks - whole) < 1e-3 * whole:
        return f" (it is a {ranks}th of that, the number of ranks: averaged twice?)"
    return ""


def _layouts(folder: Path) -> list[str]:
    """Those of a strategy's own that are in a folder."""
    return [str(kept["layout"]) for kept in Manifest.read(str(folder)).layouts.values()]


def _watchdog(kit: StrategyKit) -> float:
    """Seconds after which ranks that wait are reported: long enough for one step."""
    return min(3.0, kit.cls.timeout)


def _shard_of(fabric: Fabric) -> dict[str, Any]:
    shard = fabric.strategy.shard
    feeds = list(range(shard.first, shard.first + shard.count))
    return {"replicas": shard.replicas, "feeds": feeds, "processes": shard.processes}


def _exchanged(kit: StrategyKit, dtype: str) -> list[Exchanged]:
    told: list[Exchanged] = kit.once(kit.largest, exchanging.exchange)
    if dtype in told[0].unsupported:
        pytest.skip(f"the device has no {dtype}: {told[0].unsupported[dtype]}")
    return told


def _stack(size: int, dtype: str) -> Tensor:
    return torch.stack([exchanging.tensor_of(rank, DTYPES[dtype]) for rank in range(size)])


def _reduced(stacked: Tensor, op: str) -> Tensor:
    """By the definition in ``Collectives.all_reduce``."""
    dtype = stacked.dtype
    wide = stacked.double() if dtype.is_floating_point else stacked.long()
    if op == "mean":
        mean = wide.double().mean(0)
        return mean.to(dtype if dtype.is_floating_point else torch.get_default_dtype())
    if op == "sum":
        total = wide.sum(0)
        return total if dtype == torch.bool else total.to(dtype)
    result = {"min": wide.amin(0), "max": wide.amax(0), "product": wide.prod(0)}[op]
    return result.to(dtype)


def _close(found: Tensor, right: Tensor) -> bool:
    """Of one dtype, and equal but for the rounding of a reduction in 16 bits."""
    alike = found.dtype == right.dtype and found.shape == right.shape
    return alike and torch.allclose(found.double(), right.double(), rtol=1e-2, atol=1e-6)


def _same(one: Any, other: Any) -> bool:
    """Equality of nested data with tensors in it."""
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and one.dtype == other.dtype
        return alike and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(_same(a, b) for a, b in pairs)
    return bool(one == other)
