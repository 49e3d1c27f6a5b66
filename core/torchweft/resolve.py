"""A request and a catalog become a plan. Pure but for probes.

Accelerator, strategy, precision and launcher are decided in this order; a spec may only restrict
itself to what was decided before it. What was asked for by name is done or refused with the way
out, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchweft.catalog import Catalog, Entry, narrower, probe
from torchweft.detection import detect
from torchweft.errors import IncompatiblePlan, InvalidRequest, NameClash, NotAvailable
from torchweft.misfits import launcher_misfits, misfits, strategy_misfits
from torchweft.missing import clashing, package_to_install, unknown_name
from torchweft.options import check_options
from torchweft.plan import Decision, Rejected, RunPlan, Topology
from torchweft.request import RunRequest
from torchweft.specs import (
    AcceleratorSpec,
    Availability,
    LauncherSpec,
    Preset,
    StrategySpec,
    load_target,
)
from torchweft.topology import Site

__all__ = ["resolve"]


def resolve(
    request: RunRequest,
    catalog: Catalog,
    *,
    environ: Mapping[str, str],
    given: Mapping[str, Entry] | None = None,
    objections: Callable[[RunPlan], list[str]] = lambda plan: [],
) -> RunPlan:
    """Decide everything that has to be decided before a process starts.

    Args:
        request: what the user asked for.
        catalog: what is installed.
        environ: read to detect a launcher that already made this process.
        given: by kind, the entry of an object that the user made; it is taken as it is.
        objections: asked once, about the finished plan.

    Raises:
        TorchweftError: of the kind that fits; nothing was started.
    """
    return _Resolver(request, catalog, environ, given or {}).plan(objections)


#: Asked about each candidate: what speaks against it, one clause each.
_Objections = Callable[[Any], list[str]]


@dataclass(slots=True, kw_only=True)
class _Sifted:
    """Candidates of one kind: what can be used, what does not fit, what is not available."""

    usable: list[Entry] = field(default_factory=list)
    unfit: list[Rejected] = field(default_factory=list)
    unavailable: list[Rejected] = field(default_factory=list)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return (*self.unfit, *self.unavailable)


class _Resolver:
    """The state of one resolution."""

    def __init__(
        self,
        request: RunRequest,
        catalog: Catalog,
        environ: Mapping[str, str],
        given: Mapping[str, Entry],
    ) -> None:
        self.request = request
        self.catalog = catalog
        self.given = given
        self.decisions: dict[str, Decision] = {}
        self._answers: dict[tuple[str, str], Availability] = {}
        self._check_given()
        self.detected = detect(catalog, environ, self._named("launcher"))
        self._check_detected()

    def plan(self, objections: Callable[[RunPlan], list[str]]) -> RunPlan:
        accelerator: Any = self._choose("accelerator", lambda spec: [])
        site = Site(
            request=self.request,
            accelerator=accelerator,
            count=self._probe(self._entry("accelerator")).count,
            detection=self.detected.detection,
        )
        named = self._named("strategy") is not None
        strategy: Any = self._choose(
            "strategy",
            lambda spec: strategy_misfits(spec, accelerator, site.topology(spec, named=named)),
        )
        topology = site.topology(strategy, named=named)
        site.check_started(topology, strategy)
        precision: Any = self._choose(
            "precision", lambda spec: misfits(spec, accelerator, strategy)
        )
        preset = strategy.preset(self.request.strategy or "")
        launcher = self._choose_launcher(accelerator, strategy, preset, topology)
        plan = RunPlan(
            accelerator=accelerator,
            strategy=strategy,
            precision=precision,
            launcher=launcher,
            topology=topology,
            options=self._options(strategy, preset),
            decisions=tuple(self.decisions.values()),
            notes=tuple(plugin.failure for plugin in self.catalog.broken),
        )
        sentences = objections(plan)
        if sentences:
            raise IncompatiblePlan("; ".join(sentences))
        return plan

    # -- what was asked for --------------------------------------------------------------------

    def _named(self, kind: str) -> str | None:
        """The name that was asked for, by itself or through an object; None: left open."""
        name: str | None = getattr(self.request, kind)
        return self.given[kind].spec.name if name is None and kind in self.given else name

    def _asked(self, kind: str, name: str) -> str:
        """The words for what was asked for, with where, if that was not the script."""
        if kind in self.given:
            return f"the {kind} object {self.given[kind].describe()}"
        source = self.request.sources.get(kind)
        return f"{kind} '{name}'" + (f" ({source})" if source else "")

    def _check_given(self) -> None:
        """An object of the user's is what it is: a name or options beside it must not differ."""
        for kind, entry in self.given.items():
            name: str | None = getattr(self.request, kind)
            if name is None:
                continue
            preset = entry.spec.preset(name)
            options = {**(preset.options if preset else {}), **self.request.options.get(kind, {})}
            if name not in entry.spec.names() or options:
                source = self.request.sources.get(kind, f"{kind}=")
                written = f"{name}:{_written(options)}" if options else name
                raise InvalidRequest(
                    f"{source} says '{written}', and the script made the {kind} object "
                    f"{entry.describe()}; leave one of them out"
                )

    def _check_detected(self) -> None:
        """A launcher may know that what it made is no run."""
        detection = self.detected.detection
        if detection is not None and detection.objection:
            raise InvalidRequest(f"{detection.reason}, but {detection.objection}")

    # -- choosing one kind ---------------------------------------------------------------------

    def _choose(
        self, kind: str, objections: _Objections, name: str | None = None, why: str = "named"
    ) -> Any:
        """Decide a kind: the object given, ``name``, the name asked for, or ``auto``."""
        wanted = name or self._named(kind)
        if kind in self.given:
            candidates: Iterable[Entry] = (self.given[kind],)
        elif wanted is not None:
            candidates = self._entries_named(kind, wanted)
        else:
            candidates = (e for e in self.catalog.entries(kind) if e.spec.priority is not None)
        sifted = self._sift(candidates, objections)
        if not sifted.usable:
            raise self._nothing_usable(kind, wanted, why if name else "", sifted, objections)
        if wanted is None:
            entry, why = self._best(kind, sifted.usable)
        else:
            entry = self._most_specific(kind, wanted, sifted.usable)
        return self._decide(kind, entry, why, sifted.rejected)

    def _decide(
        self, kind: str, entry: Entry, why: str, rejected: tuple[Rejected, ...] = ()
    ) -> Any:
        if kind in self.given:
            wanted = "an object of that class"
        else:
            wanted = getattr(self.request, kind) or "auto"
        self.decisions[kind] = Decision(
            kind=kind,
            wanted=wanted,
            spec=entry.spec,
            provider=entry.provider,
            why=why,
            rejected=rejected,
        )
        return entry.spec

    def _entry(self, kind: str) -> Entry:
        decision = self.decisions[kind]
        return Entry(spec=decision.spec, provider=decision.provider)

    def _entries_named(self, kind: str, name: str) -> tuple[Entry, ...]:
        source = self.request.sources.get(kind, "")
        clash = self.catalog.clash(kind, name)
        if clash is not None:
            raise clashing(kind, name, clash, source=source)
        entries = self.catalog.named(kind, name)
        if not entries:
            raise unknown_name(kind, name, self.catalog, source=source)
        return entries

    def _sift(self, candidates: Iterable[Entry], objections: _Objections) -> _Sifted:
        sifted = _Sifted()
        for entry in candidates:
            name, provider = entry.spec.name, entry.provider
            sentences = objections(entry.spec)
            if sentences:
                reason = "; ".join(sentences)
                sifted.unfit.append(Rejected(name=name, provider=provider, reason=reason))
                continue
            answer = self._probe(entry)
            if answer.ok:
                sifted.usable.append(entry)
            else:
                sifted.unavailable.append(
                    Rejected(name=name, provider=provider, reason=answer.reason, hint=answer.hint)
                )
        return sifted

    def _probe(self, entry: Entry) -> Availability:
        # A driver that takes its time to answer is asked once.
        key = entry.provider, entry.spec.probe
        if key not in self._answers:
            self._answers[key] = probe(entry)
        return self._answers[key]

    def _most_specific(self, kind: str, wanted: str, entries: list[Entry]) -> Entry:
        kept = _narrowest(entries)
        # An alias may be shared by what serves different devices that are all here.
        exact = [entry for entry in kept if entry.spec.name == wanted] or kept
        if len(exact) > 1:
            raise NameClash(
                f"{kind} '{wanted}' could be {exact[0].describe()} or {exact[1].describe()} here; "
                f"write the name of the one that you want"
            )
        return exact[0]

    def _best(self, kind: str, entries: list[Entry]) -> tuple[Entry, str]:
        top = max(entry.spec.priority or 0 for entry in entries)
        kept = _narrowest([entry for entry in entries if (entry.spec.priority or 0) == top])
        if len(kept) > 1:
            first, second = kept[:2]
            if first.spec.name == second.spec.name:
                raise clashing(kind, first.spec.name, (first, second))
            raise NameClash(
                f"{kind}='auto' could be {first.describe()} or {second.describe()}, which "
                f"declare the same priority; name the {kind} that you want"
            )
        if len(entries) == 1:
            return kept[0], "the only one for 'auto' that can be used"
        return kept[0], f"highest priority of {len(entries)} for 'auto' that can be used"

    def _nothing_usable(
        self, kind: str, wanted: str | None, why: str, sifted: _Sifted, objections: _Objections
    ) -> NotAvailable | IncompatiblePlan:
        said = "; ".join(rejected.sentence() for rejected in sifted.rejected)
        missing = package_to_install(kind, wanted, self.catalog)
        # What could be installed or repaired is not available; the rest does not go together.
        kind_of_error = NotAvailable if sifted.unavailable or missing else IncompatiblePlan
        if wanted is None:
            said = said or "nothing that is installed is meant for 'auto'"
            return kind_of_error(f"no {kind} can be used here: {said}{missing}")
        others = self._sift(
            (e for e in self.catalog.entries(kind) if wanted not in e.spec.names()), objections
        )
        names = sorted({entry.spec.name for entry in others.usable})
        instead = f"; what can be used: {', '.join(names)}" if names else ""
        asked = self._asked(kind, wanted) + (f" ({why})" if why else "")
        message = f"{asked} cannot be used here: {said}{missing}{instead}"
        return kind_of_error(message)

    # -- launcher ------------------------------------------------------------------------------

    def _choose_launcher(
        self,
        accelerator: AcceleratorSpec,
        strategy: StrategySpec,
        preset: Preset | None,
        topology: Topology,
    ) -> LauncherSpec:
        detected = self.detected.entry.spec if self.detected.entry else None

        def objections(spec: LauncherSpec) -> list[str]:
            failed = [r.reason for r in self.detected.failed if r.name == spec.name]
            return failed + launcher_misfits(
                spec, accelerator, strategy, topology, detected=detected
            )

        asked = self._named("launcher")
        wished = preset.launcher if preset else None
        if asked and wished and not self._same_launcher(asked, wished):
            raise IncompatiblePlan(
                f"strategy '{self.request.strategy}' starts its processes with launcher "
                f"'{wished}', but {self._asked('launcher', asked)} was asked for; write "
                f"strategy='{strategy.name}' with launcher='{asked}'"
            )
        if self.detected.entry is not None:
            return self._detected_launcher(self.detected.entry, asked, objections)
        chosen: LauncherSpec
        if wished and not asked:
            why = f"strategy='{self.request.strategy}' needs it"
            chosen = self._choose("launcher", objections, wished, why)
        else:
            chosen = self._choose("launcher", objections)
        decision = self.decisions["launcher"]
        # What made this process, and does not count.
        rejected = (*decision.rejected, *self.detected.others)
        self.decisions["launcher"] = replace(decision, rejected=rejected)
        return chosen

    def _detected_launcher(
        self, entry: Entry, asked: str | None, objections: Callable[[LauncherSpec], list[str]]
    ) -> LauncherSpec:
        assert self.detected.detection is not None
        reason = self.detected.detection.reason
        if asked and asked not in entry.spec.names():
            raise IncompatiblePlan(
                f"{self._asked('launcher', asked)} was asked for, but {reason}; leave launcher "
                "out, or start the script with python"
            )
        spec: Any = entry.spec
        against = objections(spec)
        if against:
            raise IncompatiblePlan(
                f"{reason}, but launcher {entry.describe()} does not fit: {'; '.join(against)}"
            )
        chosen: LauncherSpec = self._decide(
            "launcher", entry, f"detected: {reason}", self.detected.others
        )
        return chosen

    def _same_launcher(self, a: str, b: str) -> bool:
        return a == b or self.catalog.named("launcher", a) == self.catalog.named("launcher", b)

    # -- options -------------------------------------------------------------------------------

    def _options(
        self, strategy: StrategySpec, preset: Preset | None
    ) -> Mapping[str, Mapping[str, Any]]:
        options = {kind: dict(chosen) for kind, chosen in self.request.options.items()}
        if preset and preset.options and "strategy" not in self.given:
            mine = options.setdefault("strategy", {})
            for key, value in preset.options.items():
                if mine.setdefault(key, value) != value:
                    raise InvalidRequest(
                        f"strategy '{preset.alias}' stands for {key}={value!r}, and the option "
                        f"{key}={mine[key]!r} contradicts it; write "
                        f"strategy='{strategy.name}:{key}=…'"
                    )
        for kind, chosen in options.items():
            # The class is imported only here, so that a request without options stays free of it.
            decision = self.decisions[kind]
            cls = load_target(decision.spec.target, decision.provider)
            check_options(kind, decision.spec.name, cls, chosen)
        return options


def _narrowest(entries: list[Entry]) -> list[Entry]:
    return [a for a in entries if not any(narrower(b.spec, a.spec) for b in entries)]


def _written(options: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())
