"""Whether an accelerator is right: devices, random numbers, memory, and training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from torchweft.errors import NotAvailable
from torchweft.fabric import Fabric
from torchweft.testing import computing
from torchweft.testing.declared import Subject, find
from torchweft.testing.meeting import Meeting
from torchweft.testing.ranks import run_ranks
from torchweft.testing.training import Case, alone, train

__all__ = ["AcceleratorConformance"]

#: Devices that are tried at once, where there are as many.
_MOST = 4


class AcceleratorConformance:
    """Whether an accelerator gives processes their devices. Subclass it in a test file.

    ::

        class TestMine(AcceleratorConformance):
            accelerator = "mine"

    Where the spec's probe says that there is no such device, every test is skipped with the
    probe's reason. The device is used in processes made for it, never in that of the tests.

    Attributes:
        accelerator: its name, with options as a user writes them.
        tolerance: how far what was computed and trained in 32-bit may be from the processor's;
            relative for numbers above 1.
        timeout: seconds for each run of ranks.
    """

    accelerator: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-4
    timeout: ClassVar[float] = 60.0

    @pytest.fixture
    def subject(self) -> Subject:
        """What is tested; skips where there is no such device."""
        return find(type(self), "accelerator")

    def _run(self, subject: Subject, devices: Any, function: Any, *args: Any) -> list[Any]:
        """What ranks on such devices answer."""
        instead = {"strategy": Meeting()} if devices != 1 else {"strategy": "single_device"}
        if devices != 1 and "strategy" in subject.spec.exclusive:
            pytest.skip(
                f"{subject.title} takes only strategies made for it; StrategyConformance tries "
                "those on several devices"
            )
        return run_ranks(
            devices,
            function,
            *args,
            accelerator=subject.asked,
            timeout=self.timeout,
            **instead,
        )

    def _on_host(self, subject: Subject, ranks: int, function: Any, *args: Any) -> list[Any]:
        """What processes answer that have not bound such a device yet."""
        target, options = subject.spec.target, subject.options
        return run_ranks(
            ranks, function, target, options, *args, strategy=Meeting(), timeout=self.timeout
        )

    # -- before there is a device ----------------------------------------------------------------

    def test_constructing_it_touches_no_device(self, subject: Subject) -> None:
        """``Accelerator``: it is constructed before processes are forked, and bound after."""
        told = self._on_host(subject, 1, computing.construct, subject.spec.device)[0]
        assert not told["opened"], (
            f"{subject.title} opened {', '.join(told['opened'])} while it was imported and "
            "constructed; an Accelerator touches its device from bind() on, so that processes can "
            "be forked before"
        )
        assert not told["initialised"], (
            f"{subject.title} had torch initialise '{subject.spec.device}' while it was imported "
            "and constructed; an Accelerator touches its device from bind() on"
        )

    def test_fork_hazard_is_none_or_a_sentence(self, subject: Subject) -> None:
        """``Accelerator.fork_hazard``: why a fork would have a broken device."""
        hazard = self._on_host(subject, 1, computing.construct, subject.spec.device)[0]["hazard"]
        assert hazard is None or (isinstance(hazard, str) and hazard.strip()), (
            f"{subject.title}: fork_hazard() returned {hazard!r}; Accelerator.fork_hazard returns "
            "the reason against a fork in words, or None"
        )

    def test_the_backend_is_known_to_torch(self, subject: Subject) -> None:
        """``Accelerator.backend`` names a backend of ``torch.distributed``."""
        told = self._run(subject, 1, computing.talk)[0]
        assert not told["unknown"], (
            f"{subject.title}: its backend is '{told['backend']}', and torch.distributed knows "
            f"{', '.join(told['known'])} (Accelerator.backend); a backend of a library's own is "
            "known once bind() has imported the library"
        )

    # -- how many there are, and which -----------------------------------------------------------

    def test_every_rank_is_bound_to_its_device(self, subject: Subject) -> None:
        """``Accelerator.bind``: the one of ``devices`` at the rank's local rank."""
        here = self._several(subject)
        self._check_bound(subject, tuple(range(here)))

    def test_ranks_are_bound_to_the_devices_asked_for(self, subject: Subject) -> None:
        """``devices=[…]``: those, in that order."""
        if not subject.spec.selectable:
            pytest.skip(f"{subject.title}: single devices cannot be chosen (selectable=False)")
        here = self._several(subject)
        self._check_bound(subject, tuple(reversed(range(here))))
        self._check_bound(subject, (here - 1,))

    def _several(self, subject: Subject) -> int:
        return min(_MOST, 2 if subject.count is None else subject.count)

    def _check_bound(self, subject: Subject, devices: tuple[int, ...]) -> None:
        spec = subject.spec
        told = self._on_host(subject, len(devices), computing.bind, devices)
        for rank, (bound, index) in enumerate(zip(told, devices, strict=True)):
            who = f"{subject.title}: bind() of local rank {rank} with devices={devices}"
            assert "returned" not in bound, (
                f"{who} returned {bound['returned']}; Accelerator.bind returns a torch.device"
            )
            assert bound["type"] == spec.device, (
                f"{who} returned a device of type '{bound['type']}', and its spec declares "
                f"device='{spec.device}' (Accelerator.bind)"
            )
            wanted = (index,) if spec.selectable else (index, None)
            assert bound["index"] in wanted, (
                f"{who} returned device {bound['index']}; Accelerator.bind gives local rank {rank} "
                f"the device {index}, devices[rank.local_rank]"
            )
            assert bound["current"] in (bound["index"], None), (
                f"{who}: a tensor on '{bound['type']}' was made on device {bound['current']}; "
                "Accelerator.bind makes the device current"
            )

    def test_the_number_of_devices_holds(self, subject: Subject) -> None:
        """``Availability.count``: as many can be asked for and not one more; None: no limit."""
        asked, counted = subject.asked, subject.count
        if counted is None:
            self._check_planned(subject, 7, 7)
            return
        self._check_planned(subject, "all", counted)
        with pytest.raises(NotAvailable, match=rf"has {counted} \("):
            Fabric(accelerator=asked, devices=counted + 1, strategy=self._any(subject))
        seen = self._run(subject, 1, computing.count)[0]
        assert seen in (None, counted), (
            f"{subject.title}: its probe counts {counted} devices, and a process that uses one "
            f"sees {seen} (Availability.count)"
        )

    def _any(self, subject: Subject) -> Any:
        """A strategy for any number of devices."""
        return "auto" if "strategy" in subject.spec.exclusive else Meeting()

    def _check_planned(self, subject: Subject, asked: int | str, right: int) -> None:
        plan = Fabric(accelerator=subject.asked, devices=asked, strategy=self._any(subject)).plan
        assert plan.topology.devices == tuple(range(right)), (
            f"{subject.title}: devices={asked!r} is planned as {plan.topology.devices}, and its "
            f"probe counts {subject.count} (Availability.count; None is no limit)"
        )

    # -- on the device ---------------------------------------------------------------------------

    def test_batches_are_moved(self, subject: Subject) -> None:
        """Nested collections, a model and a loader's batches arrive with their values."""
        told = self._run(subject, 1, computing.move)[0]
        for what in ("devices", "of batches", "model"):
            wrong = [place for place in told[what] if place]
            assert not wrong, f"{subject.title}: what was moved to the device is on {wrong[0]}"
        moved, given = told["values"], told["given"]
        pairs = {
            "a float": (moved["list"][0], given["list"][0]),
            "an integer": (moved["list"][1][0], given["list"][1][0]),
            "a boolean": (moved["flag"], given["flag"]),
            "a loader's batch": (told["batches"], torch.arange(8.0)),
        }
        for what, (found, right) in pairs.items():
            assert torch.equal(found, right), (
                f"{subject.title}: {what} tensor {right.tolist()} arrived as {found.tolist()}"
            )
        rest = (moved["list"][1][1], moved["text"], moved["nothing"])
        assert rest == (3, "kept", None), f"{subject.title}: what is no tensor became {rest}"

    def test_host_memory_is_what_it_says(self, subject: Subject) -> None:
        """``Accelerator.host_memory``: the device computes with a loader's batches as they are."""
        told = self._run(subject, 1, computing.move)[0]
        assert told["mixed"] or not told["on host"], (
            f"{subject.title} declares host_memory = True, and cannot compute with a tensor in the "
            "host's memory (Accelerator.host_memory)"
        )

    def test_it_computes_what_the_processor_computes(self, subject: Subject) -> None:
        """A few operations, results on the device."""
        told = self._run(subject, 1, computing.compute)[0]
        for what, (wrong, found, right) in told.items():
            assert not wrong, f"{subject.title}: {what}: the result is on {wrong}"
            assert found.dtype == right.dtype, f"{subject.title}: {what} is of {found.dtype}"
            gap = (found.double() - right.double()).abs().max().item()
            scale = max(1.0, right.double().abs().max().item())
            assert gap <= self.tolerance * scale, (
                f"{subject.title}: {what} is {gap:.3g} away from the processor's (tolerance "
                f"{self.tolerance:g})"
            )

    def test_random_numbers_are_restored(self, subject: Subject) -> None:
        """``Accelerator.rng_state`` and ``set_rng_state``; the host's, where it has no own."""
        told = self._run(subject, 1, computing.draw)[0]
        assert not torch.equal(told["first"], told["further"]), (
            f"{subject.title}: the same random numbers are drawn again and again"
        )
        for again in ("again", "and again"):
            assert torch.equal(told["first"], told[again]), f"{subject.title}: " + (
                "set_rng_state(rng_state()) does not bring the same random numbers back "
                "(Accelerator.set_rng_state)"
                if told["own"]
                else "its random numbers are not the host generator's, and rng_state() "
                "returns None (Accelerator.rng_state)"
            )

    def test_seed_everything_covers_it(self, subject: Subject) -> None:
        """The same seed, the same random numbers on the device."""
        told = self._run(subject, 1, computing.draw)[0]
        assert torch.equal(told["seeded"], told["seeded again"]), (
            f"{subject.title}: seed_everything() does not seed the device; it calls "
            "torch.manual_seed, which a backend of torch has to hear of"
        )
        assert not torch.equal(told["seeded"], told["otherwise"]), (
            f"{subject.title}: two seeds of seed_everything() give the same random numbers"
        )

    def test_memory_is_counted(self, subject: Subject) -> None:
        """``Accelerator.memory``: bytes by name, or nothing at all."""
        told = self._run(subject, 1, computing.allocate)[0]
        before, after = told["before"], told["after"]
        for counted in (before, after):
            sound = isinstance(counted, dict) and all(
                isinstance(name, str) and type(value) is int and value >= 0
                for name, value in counted.items()
            )
            assert sound, (
                f"{subject.title}: memory() returned {counted!r}; Accelerator.memory returns bytes "
                "in use by name, whole numbers from 0"
            )
        if after:
            grown = max(value - before.get(name, 0) for name, value in after.items())
            assert grown >= told["bytes"], (
                f"{subject.title}: a tensor of {told['bytes']} bytes was made, and memory() went "
                f"from {before} to {after} (Accelerator.memory)"
            )

    def test_a_fork_after_use_works_or_is_warned_of(self, subject: Subject) -> None:
        """``Accelerator.fork_hazard`` is None only where a fork has a device that works."""
        told = self._run(subject, 1, computing.fork_after_use)[0]
        hazard = told["hazard"]
        assert hazard is None or (isinstance(hazard, str) and hazard.strip()), (
            f"{subject.title}: fork_hazard() returned {hazard!r} after the device was used; "
            "Accelerator.fork_hazard returns the reason in words, or None"
        )
        assert hazard is not None or told["status"] == 0, (
            f"{subject.title}: fork_hazard() returned None after the device was used, and a fork "
            f"could not use it (it ended with {told['status']}); Accelerator.fork_hazard says why "
            "not to fork"
        )

    def test_modules_are_made_there(self, subject: Subject) -> None:
        """Under ``fabric.init_module()``."""
        wrong = [place for place in self._run(subject, 1, computing.initialise)[0] if place]
        assert not wrong, f"{subject.title}: a parameter made under init_module() is on {wrong[0]}"

    def test_two_ranks_talk(self, subject: Subject) -> None:
        """Over ``Accelerator.backend``."""
        if subject.count is not None and subject.count < 2:
            pytest.skip(f"{subject.title}: two devices are needed, {subject.count} here")
        told = self._run(subject, 2, computing.talk)
        for rank, heard in enumerate(told):
            who = f"{subject.title}, backend '{heard['backend']}', rank {rank} of 2"
            assert not heard["where"], f"{who}: the result of all_reduce is on {heard['where']}"
            assert heard["summed"].tolist() == [3.0] * 3, f"{who}: 1 + 2 is {heard['summed']}"
            assert heard["gathered"].tolist() == [[1.0] * 3, [2.0] * 3], f"{who}: {heard}"
            assert heard["broadcast"].tolist() == [1.0] * 3, f"{who}: {heard['broadcast']}"

    # -- training --------------------------------------------------------------------------------

    @pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
    def test_it_trains_as_the_processor_does(
        self, subject: Subject, optimizer: str, tmp_path: Path
    ) -> None:
        """Losses and final parameters, on one device."""
        case = Case(model="buffers", optimizer=optimizer, clip="norm")
        told = self._run(subject, 1, train, case, tmp_path / "x.ckpt")[0]
        right = alone(case, [told.seen])
        for step, (loss, wanted) in enumerate(zip(told.losses, right.losses[0], strict=True)):
            assert self._near(loss, wanted), (
                f"{subject.title}: the loss of step {step} is {loss:.7g}, and {wanted:.7g} by the "
                f"processor in float64 (tolerance {self.tolerance:g})"
            )
        for name, parameter in right.model.named_parameters():
            gap = (told.state[name].double() - parameter).abs().max().item()
            assert self._near(gap, 0.0), (
                f"{subject.title}: parameter '{name}' ends {gap:.3g} away from the processor's "
                f"(tolerance {self.tolerance:g})"
            )

    def _near(self, found: float, right: float) -> bool:
        return abs(found - right) <= self.tolerance * max(1.0, abs(right))

    # -- checkpoints -----------------------------------------------------------------------------

    def test_its_checkpoint_is_read_without_it(self, subject: Subject, tmp_path: Path) -> None:
        """By plain torch, and on the processor."""
        path = tmp_path / "x.ckpt"
        saved = self._run(subject, 1, computing.save, path, 1)[0]
        content = torch.load(path, weights_only=True)
        where = {str(value.device) for value in content["model"].values()}
        assert where == {"cpu"}, f"{subject.title}: a checkpoint holds tensors on {where}"
        told = run_ranks(1, computing.load, path, 2, timeout=self.timeout)[0]
        self._check_loaded(subject, saved, told)

    def test_it_reads_the_processor_s_checkpoint(self, subject: Subject, tmp_path: Path) -> None:
        """Model and optimizer, on the device."""
        path = tmp_path / "x.ckpt"
        saved = run_ranks(1, computing.save, path, 1, timeout=self.timeout)[0]
        told = self._run(subject, 1, computing.load, path, 2)[0]
        self._check_loaded(subject, saved, told)

    def _check_loaded(self, subject: Subject, saved: dict[str, Any], told: dict[str, Any]) -> None:
        wrong = [place for place in told["where"] if place]
        assert not wrong, f"{subject.title}: what was loaded is on {wrong[0]}"
        assert told["moments"] == 2 * len(saved), (
            f"{subject.title}: {told['moments']} tensors of the optimizer's state were loaded, and "
            f"{2 * len(saved)} were saved"
        )
        for name, value in saved.items():
            assert torch.equal(told["values"][name], value), (
                f"{subject.title}: '{name}' was saved and loaded as another value"
            )
