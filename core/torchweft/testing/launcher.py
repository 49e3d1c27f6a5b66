"""Whether a launcher is right: who its ranks are, what they find, and how everything ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from torchweft.specs import load_target
from torchweft.testing.declared import Subject, find
from torchweft.testing.launched import FAILURES
from torchweft.testing.launches import TYPED, WORDS, Launched, Launches

__all__ = ["LauncherConformance", "LauncherKit"]

T = TypeVar("T", bound=Callable[..., Any])

_KIT = pytest.StashKey["LauncherKit"]()

#: What the script raises, as its traceback shows it.
_FRAME = "in give_up\n"


def _of(*roles: str) -> Callable[[T], T]:
    """Which runs a test is about, so that they can begin before it does."""

    def mark(test: T) -> T:
        test.roles = roles  # type: ignore[attr-defined]
        return test

    return mark


class LauncherKit:
    """What the tests of one class share: the launcher, and runs of it.

    Runs have roles: ``"main"`` is one in which all is well; ``"functions"`` that in which a
    process calls ``launch(function)`` again and again, and functions fail; the others are named
    for how they end.
    """

    def __init__(self, cls: type[LauncherConformance], folder: Path) -> None:
        accelerator = find(cls, "accelerator")
        subject = find(cls, "launcher", accelerator.spec.device)
        self.subject = subject
        spec = subject.spec
        self.title = subject.title
        self.size = 1 if spec.processes == "one" else cls.devices
        self.owns: bool = subject.load().owns_ranks
        self.required = spec.function == "required"
        # Where functions are called by a process that outlives the ranks, one does everything.
        self.calls = self.owns and not spec.outside
        # How the one process ends that nobody made is not the launcher's doing.
        self.nobodys = self.size == 1 and not self.owns
        self.failures = ("raise",) if self.nobodys else FAILURES
        self.launches = Launches(
            command=_command(cls, subject),
            settings={
                "accelerator": cls.accelerator,
                "devices": self.size,
                "launcher": None if spec.outside else subject.asked,
                "function": self.required,
                "detect": spec.detect,
            },
            environ=cls.environ,
            folder=folder,
            timeout=cls.timeout,
        )

    def run(self, role: str) -> str:
        """The name of the run that has a role."""
        alone = self.calls and self.required
        if role == "main" or (alone and role in FAILURES):
            return "functions" if alone else "well" if role == "main" else role
        return role

    def begin(self, roles: Sequence[str]) -> None:
        """Start runs in the background."""
        there = {*self._roles()}
        self.launches.start(dict.fromkeys(self.run(role) for role in roles if role in there))

    def of(self, role: str) -> Launched:
        """What came of the run that has a role."""
        return self.launches.of(self.run(role))

    def all(self) -> dict[str, Launched]:
        """Every run there is."""
        names = dict.fromkeys(map(self.run, self._roles()))
        return {name: self.launches.of(name) for name in names}

    def _roles(self) -> list[str]:
        interrupted = [] if self.nobodys else ["interrupt"]
        return ["main", *self.failures, *interrupted, *(["functions"] if self.calls else [])]

    def ranks(self) -> list[dict[str, Any]]:
        """What each rank said, where every rank said something."""
        launched = self.of("main")
        said = [told["rank"] for told in launched.said]
        assert said == list(range(self.size)), (
            f"{self.title}: {self.size} ranks were to be made, and those that came to be say that "
            f"they are {said}; Launcher.launch makes every rank once and Launcher.rank tells who "
            f"it is{launched.printed}"
        )
        return launched.said

    def calling(self) -> Launched:
        """The run with functions."""
        if not self.calls:
            pytest.skip(f"{self.title} does not own its ranks: no process calls for them")
        launched = self.of("functions")
        assert launched.caller, (
            f"{self.title}: the process that called launch(function) did not come to its end "
            f"(Launcher.launch){launched.printed}"
        )
        return launched


class LauncherConformance:
    """Whether a launcher makes the ranks of a run and ends them. Subclass it in a test file.

    ::

        class TestMine(LauncherConformance):
            launcher = "mine"

    A launcher that is outside is started by ``command``::

        class TestTorchrun(LauncherConformance):
            launcher = "torchrun"
            command = (
                "{python}", "-m", "torch.distributed.run", "--nproc-per-node={n}", "{script}",
            )

    Every run is a real script in a fresh interpreter. What does not apply follows from the spec
    (``outside``, ``function``, ``processes``, ``detect``) and from ``Launcher.owns_ranks``.

    Attributes:
        launcher: its name, with options as a user writes them.
        devices: how many ranks to make.
        accelerator: on which devices; without them every test is skipped.
        command: how somebody outside starts ``{n}`` ranks of ``{script}`` with ``{python}``; the
            script's arguments follow.
        timeout: seconds for each run; none that ends as it should takes nearly as long.
        environ: variables for the command.
    """

    launcher: ClassVar[str] = ""
    devices: ClassVar[int] = 2
    accelerator: ClassVar[str] = "cpu"
    command: ClassVar[Sequence[str]] = ()
    timeout: ClassVar[float] = 90.0
    environ: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture
    def kit(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> LauncherKit:
        """What the tests share; skips where the launcher cannot be used."""
        node: Any = request.node.getparent(pytest.Class)
        if _KIT not in node.stash:
            kit = LauncherKit(type(self), tmp_path_factory.mktemp("launches"))
            node.stash[_KIT] = kit
            node.addfinalizer(kit.launches.close)
            # Those that the tests chosen for this session will ask for.
            items: list[Any] = request.session.items
            mine = [item.function for item in items if getattr(item, "cls", None) is type(self)]
            kit.begin([role for test in mine for role in getattr(test, "roles", ())])
        found: LauncherKit = node.stash[_KIT]
        return found

    # -- who the ranks are -----------------------------------------------------------------------

    @_of("main")
    def test_every_rank_is_made_once(self, kit: LauncherKit) -> None:
        """``Launcher.rank``: from 0 to one less than the number of processes."""
        for told in kit.ranks():
            info = told["info"]
            assert info["world_size"] == kit.size, (
                f"{kit.title}: rank {told['rank']} says that there are {info['world_size']} "
                f"processes, and {kit.size} were made (RankInfo.world_size, from Launcher.rank)"
            )

    @_of("main")
    def test_every_rank_knows_its_place_on_the_node(self, kit: LauncherKit) -> None:
        """``Launcher.rank``: the local rank, and how many there are on the node."""
        told = [rank["info"] for rank in kit.ranks()]
        places = [
            (info["local_rank"], info["local_world_size"], info["node_rank"]) for info in told
        ]
        assert places == [(rank, kit.size, 0) for rank in range(kit.size)], (
            f"{kit.title}: on one node local ranks, their number and the node are {places} "
            "(Launcher.rank)"
        )

    @_of("main")
    def test_fabric_says_the_same(self, kit: LauncherKit) -> None:
        """What a user's code reads."""
        found = [rank["fabric"] for rank in kit.ranks()]
        right = [[rank, kit.size, rank, 0, rank == 0] for rank in range(kit.size)]
        assert found == right, f"{kit.title}: {found} in place of {right} (Launcher.rank)"

    @_of("main")
    def test_the_variables_agree(self, kit: LauncherKit) -> None:
        """``RANK`` and the others that libraries read; a launcher that owns its ranks sets them."""
        for told in kit.ranks():
            info = told["info"]
            right = {
                "RANK": info["rank"],
                "WORLD_SIZE": info["world_size"],
                "LOCAL_RANK": info["local_rank"],
                "LOCAL_WORLD_SIZE": info["local_world_size"],
            }
            for name, value in right.items():
                found = told["variables"][name]
                assert found == str(value) or (found is None and not kit.owns), (
                    f"{kit.title}: in rank {told['rank']} the variable {name} is {found}, and "
                    f"Launcher.rank says {value}"
                )

    @_of("main")
    def test_all_ranks_are_of_one_run(self, kit: LauncherKit) -> None:
        """``RankInfo.run_id`` is the same in every rank."""
        found = {told["run_id"] for told in kit.ranks()}
        assert len(found) == 1, (
            f"{kit.title}: the ranks of one run say that they are of {sorted(found)} "
            "(RankInfo.run_id, from Launcher.rank)"
        )

    @_of("main", "raise")
    def test_every_run_is_another(self, kit: LauncherKit) -> None:
        """``RankInfo.run_id`` differs between two runs; empty where nobody made one up."""
        one = {told["run_id"] for told in kit.ranks()}
        other = {note["run_id"] for note in kit.of("raise").notes["raise"]}
        assert other, f"{kit.title}: no rank came to be{kit.of('raise').printed}"
        assert not (one & other - {""}), (
            f"{kit.title}: two runs have the id {one & other}; it keeps them apart "
            "(RankInfo.run_id, from Launcher.rank)"
        )

    @_of("main")
    def test_ranks_meet(self, kit: LauncherKit) -> None:
        """``Launcher.rendezvous``: where all find each other."""
        right = kit.size * (kit.size + 1) / 2
        for told in kit.ranks():
            assert told["sum"] == right, (
                f"{kit.title}: the sum over all ranks is {told['sum']} in rank {told['rank']}, and "
                f"it is {right}; Launcher.rendezvous tells all of them the same place"
            )

    # -- what a rank finds -----------------------------------------------------------------------

    @_of("main")
    def test_the_command_line_is_there(self, kit: LauncherKit) -> None:
        """``sys.argv`` in every rank."""
        launched = kit.of("main")
        right = [str(launched.folder), kit.run("main"), *WORDS]
        for told in kit.ranks():
            script, *arguments = told["argv"]
            assert arguments == right, (
                f"{kit.title}: rank {told['rank']} has the arguments {arguments}, and the script "
                f"was given {right} (Launcher.launch)"
            )
            files = {Path(name).name for name in (script, told["file"])}
            assert files == {"train.py"}, (
                f"{kit.title}: rank {told['rank']} takes {files} for the script (Launcher.launch)"
            )

    @_of("main")
    def test_the_folder_is_the_same(self, kit: LauncherKit) -> None:
        """The working directory in every rank."""
        for told in kit.ranks():
            assert told["cwd"] == str(kit.of("main").cwd), (
                f"{kit.title}: rank {told['rank']} works in {told['cwd']}, and the command was "
                f"started in {kit.of('main').cwd} (Launcher.launch)"
            )

    @_of("main")
    def test_the_environment_is_there(self, kit: LauncherKit) -> None:
        """What was exported before the command, and by the script before it launched."""
        for told in kit.ranks():
            assert told["exported"] == ["yes", "yes"], (
                f"{kit.title}: rank {told['rank']} has {told['exported']} of two variables that "
                "were exported as 'yes', before the script and by it (Launcher.launch)"
            )

    @_of("main")
    def test_the_first_rank_reads_what_is_typed(self, kit: LauncherKit) -> None:
        """Standard input belongs to rank 0."""
        found = kit.ranks()[0]["stdin"]
        assert found == TYPED, (
            f"{kit.title}: rank 0 reads {found!r} from standard input, where {TYPED!r} was typed "
            "(Launcher.launch)"
        )

    @_of("main")
    def test_what_ranks_print_appears_once(self, kit: LauncherKit) -> None:
        """Nothing is lost that was printed and not flushed, and nothing appears twice."""
        launched = kit.of("main")
        for told in kit.ranks():
            times = launched.result.out.count(f"said by rank {told['rank']}.")
            assert times == 1, (
                f"{kit.title}: what rank {told['rank']} printed appears {times} times "
                f"(Launcher.launch){launched.printed}"
            )

    # -- launching in a rank ---------------------------------------------------------------------

    @_of("main")
    def test_ranks_know_who_made_them(self, kit: LauncherKit) -> None:
        """``LauncherSpec.detect``: a plan that is made in a rank has this launcher."""
        if not kit.subject.spec.detect:
            pytest.skip(f"{kit.title} has no detection")
        name = kit.subject.spec.name
        for told in kit.ranks():
            who = f"{kit.title}: in rank {told['rank']} its detection"
            found = told["detected"]["detection"]
            assert found, f"{who} returns {found}, and a Detection is due (LauncherSpec.detect)"
            for field in ("world_size", "processes_per_node"):
                assert found[field] in (None, kit.size), (
                    f"{who} says {field}={found[field]}, and it is {kit.size}"
                )
            assert told["detected"]["launcher"] == name, (
                f"{who} is not what a plan goes by: it has launcher {told['detected']['launcher']}"
            )
            assert found["reason"].strip(), f"{who} gives no reason"
            assert found["reason"] in told["detected"]["why"], (
                f"{who} gives the reason '{found['reason']}', and the plan says "
                f"'{told['detected']['why']}'"
            )

    def test_nobody_made_other_processes(self, kit: LauncherKit) -> None:
        """``LauncherSpec.detect``: None for an environment in which nothing is said."""
        if not kit.subject.spec.detect:
            pytest.skip(f"{kit.title} has no detection")
        found = load_target(kit.subject.spec.detect, kit.subject.entry.provider)({})
        assert found is None, (
            f"{kit.title}: its detection returns {found} for an empty environment, and None is due "
            "(LauncherSpec.detect)"
        )

    @_of("main")
    def test_a_second_launch_is_refused(self, kit: LauncherKit) -> None:
        """In a rank, with words."""
        for told in kit.ranks():
            second = told["second launch"]
            assert second["error"] == "Misuse", (
                f"{kit.title}: a second launch() in rank {told['rank']} came to {second}, and a "
                "Misuse is due"
            )

    @_of("main", "functions")
    def test_a_function_in_a_rank_is_called_there(self, kit: LauncherKit) -> None:
        """``launch(function)`` in a rank makes no more processes (``Launcher.is_rank``)."""
        called = kit.calling().said if kit.calls else []
        for told in (*kit.ranks(), *called):
            right = [told["pid"], told["rank"]]
            assert told["nested"] == right, (
                f"{kit.title}: launch(function) in rank {told['rank']} called it in process and "
                f"rank {told['nested']} in place of {right} (Launcher.launch, Launcher.is_rank)"
            )

    # -- functions -------------------------------------------------------------------------------

    @_of("functions")
    def test_without_a_function_it_is_refused(self, kit: LauncherKit) -> None:
        """``LauncherSpec.function="required"``: ``launch()`` says what to write."""
        if not kit.required:
            pytest.skip(f"{kit.title} needs no function (LauncherSpec.function)")
        found = kit.calling().caller["without a function"]
        assert (found["error"], "function" in found["words"]) == ("Misuse", True), (
            f"{kit.title}: launch() without a function came to {found}, and a Misuse is due that "
            "names launch(function) (LauncherSpec.function, Launcher.launch)"
        )

    @_of("functions")
    def test_arguments_arrive(self, kit: LauncherKit) -> None:
        """``launch(function, *args, **kwargs)``."""
        found = kit.calling().caller["result"]["arguments"]
        right = [1, "two", ["Tensor", "cpu", [3.0], False]]
        assert found == right, f"{kit.title}: a function got {found} in place of {right}"

    @_of("functions")
    def test_the_result_is_that_of_rank_0(self, kit: LauncherKit) -> None:
        """``Launcher.launch`` returns what rank 0 returned."""
        found = kit.calling().caller["result"]
        assert found["rank"] == 0, (
            f"{kit.title}: launch(function) returned what rank {found['rank']} returned; "
            "Launcher.launch returns what rank 0 returned"
        )

    @_of("functions")
    def test_tensors_come_back_on_the_cpu(self, kit: LauncherKit) -> None:
        """With their values, in collections too."""
        found = kit.calling().caller["result"]
        assert found["tensor"] == ["Tensor", "cpu", [1.0, 1.0], False], (
            f"{kit.title}: a tensor of ones came back as {found['tensor']} (Launcher.launch)"
        )
        assert found["nested"] == ["Tensor", "cpu", [1.0], False], (
            f"{kit.title}: a tensor in collections came back as {found['nested']} (Launcher.launch)"
        )

    @_of("functions")
    def test_what_cannot_be_pickled_is_named(self, kit: LauncherKit) -> None:
        """A result that cannot come back from another process is an error naming its type."""
        launched = kit.calling()
        ranks = {told["pid"] for told in launched.said}
        if launched.caller["pid"] in ranks:
            pytest.skip(f"{kit.title} calls functions in the process that asked for it")
        found = launched.caller["unpicklable"]
        assert (bool(found["error"]), "generator" in found["words"]) == (True, True), (
            f"{kit.title}: launch(function) whose function returns a generator came to {found}; an "
            "error is due that names the type (Launcher.launch)"
        )

    # -- how it ends -----------------------------------------------------------------------------

    @_of("main")
    def test_it_ends_well(self, kit: LauncherKit) -> None:
        """Status 0 when all is well, for a process whose functions failed and were caught too."""
        launched = kit.of("main")
        assert launched.result.status == 0, (
            f"{kit.title}: all was well and the command ended with {launched.result.status} "
            f"(Launcher.launch){launched.printed}"
        )

    @pytest.mark.parametrize("how", FAILURES)
    @_of(*FAILURES)
    def test_a_rank_that_fails_ends_the_job(self, kit: LauncherKit, how: str) -> None:
        """By an exception, ``os._exit(3)`` or SIGKILL; the others would have slept on."""
        if how not in kit.failures:
            pytest.skip(f"{kit.title}: nobody made the one process, or waits for it")
        last = kit.size - 1
        launched = kit.of(how)
        assert len(launched.notes[how]) == kit.size, (
            f"{kit.title}: {len(launched.notes[how])} of {kit.size} ranks came to the place where "
            f"the last one fails{launched.printed}"
        )
        if kit.run(how) != "functions":
            status, words = launched.result.status, launched.result.err
            assert status != 0, (
                f"{kit.title}: rank {last} failed ({how}), and the command ended with status 0 "
                f"(Launcher.launch){launched.printed}"
            )
            assert f"rank {last}" in words or not kit.owns, (
                f"{kit.title}: rank {last} failed ({how}), and the report does not name it "
                f"(Launcher.launch){launched.printed}"
            )

    @pytest.mark.parametrize("how", FAILURES)
    @_of("functions")
    def test_a_function_that_fails_raises_rank_failed(self, kit: LauncherKit, how: str) -> None:
        """``Launcher.launch`` raises ``RankFailed``; by then all other ranks have ended."""
        last = kit.size - 1
        found = kit.calling().caller["failed"][how]
        assert found["is_failure"], (
            f"{kit.title}: rank {last} failed in a function ({how}), and launch(function) came to "
            f"{found}; Launcher.launch raises RankFailed"
        )
        assert f"rank {last}" in found["words"], (
            f"{kit.title}: rank {last} failed ({how}), and RankFailed does not name it: "
            f"{found['words']}"
        )
        assert not found["alive"], (
            f"{kit.title}: Launcher.launch raised RankFailed while the ranks {found['alive']} were "
            "still running; all others have ended by then"
        )

    @_of("raise")
    def test_a_traceback_is_shown(self, kit: LauncherKit) -> None:
        """Once, by a launcher that owns its ranks; others may repeat it."""
        launched = kit.of("raise")
        words = launched.result.out + launched.result.err
        if kit.run("raise") == "functions":
            words += kit.calling().caller["failed"]["raise"]["words"]
        times = words.count(_FRAME)
        assert times == 1 or (times > 1 and not kit.owns), (
            f"{kit.title}: a rank raised an exception, and its traceback is shown {times} times "
            f"(Launcher.launch){launched.printed}"
        )

    @_of("interrupt")
    def test_an_interrupt_ends_the_job(self, kit: LauncherKit) -> None:
        """Ctrl-C: SIGINT to every process of the command's group."""
        if kit.nobodys:
            pytest.skip(f"{kit.title}: nobody made the one process, or waits for it")
        launched = kit.of("interrupt")
        assert launched.result.status != 0, (
            f"{kit.title}: it was interrupted and ended with status 0 "
            f"(Launcher.launch){launched.printed}"
        )

    @_of("main", *FAILURES, "interrupt", "functions")
    def test_no_process_is_left(self, kit: LauncherKit) -> None:
        """However it ends."""
        if not Path("/proc/self/environ").exists():
            pytest.skip("this system does not tell the environment of processes")
        for name, launched in kit.all().items():
            assert not launched.left, (
                f"{kit.title}: behind the run '{name}' there still run {'; '.join(launched.left)} "
                "(Launcher.launch)"
            )

    @_of("main", *FAILURES, "interrupt", "functions")
    def test_no_socket_is_left(self, kit: LauncherKit) -> None:
        """Nobody listens any more where the ranks met."""
        if not Path("/proc/net/tcp").exists():
            pytest.skip("this system does not tell who listens")
        for name, launched in kit.all().items():
            assert not launched.listening, (
                f"{kit.title}: behind the run '{name}' somebody still listens on the ports "
                f"{launched.listening}, where the ranks met (Launcher.rendezvous, .launch)"
            )


def _command(cls: type[LauncherConformance], subject: Subject) -> Sequence[str]:
    """The words that start the script."""
    example = '("{python}", "-m", "starter", "--ranks={n}", "{script}")'
    if subject.spec.outside and not cls.command:
        pytest.fail(
            f"{cls.__name__}: somebody outside starts the ranks of {subject.title} "
            f"(LauncherSpec.outside); write how in command = {example}",
            pytrace=False,
        )
    if cls.command and not subject.spec.outside:
        pytest.fail(
            f"{cls.__name__}: command is for launchers that are outside, and {subject.title} makes "
            "its ranks itself (LauncherSpec.outside); leave it out",
            pytrace=False,
        )
    return cls.command or ("{python}", "{script}")
