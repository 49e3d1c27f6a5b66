"""A request and a catalog become a plan. Pure but for probes.

Accelerator, strategy, precision and launcher are decided in this order; a spec may only restrict
itself to what was decided before it. What was asked for by name is done or refused with the way
out, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torchweft.catalog import Catalog, Entry, narrower, probe
from torchweft.errors import (
    BrokenPlugin,
    IncompatiblePlan,
    InvalidRequest,
    NameClash,
    NotAvailable,
    UnknownName,
    did_you_mean,
)
from torchweft.known import KNOWN
from torchweft.options import check_options
from torchweft.plan import Decision, Rejected, RunPlan, Topology
from torchweft.request import RunRequest
from torchweft.specs import Detection, LauncherSpec, PrecisionSpec, StrategySpec, load_target

__all__ = ["resolve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    entry: Entry
    reason: str
    hint: str = ""

    def sentence(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.entry.describe()}: {self.reason}{hint}"


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
        self.detected = self._detect(environ)
        self.decisions: dict[str, Decision] = {}

    def plan(self, objections: Callable[[RunPlan], list[str]]) -> RunPlan:
        accelerator: Any = self._choose("accelerator", lambda spec: [])
        count = self._device_count(accelerator)
        nodes = self._nodes()
        strategy: Any = self._choose(
            "strategy", lambda spec: self._strategy_objections(spec, count, nodes)
        )
        topology = self._topology(accelerator, strategy, count, nodes)
        precision: Any = self._choose("precision", self._precision_objections)
        launcher = self._launcher(strategy, topology)
        plan = RunPlan(
            accelerator=accelerator,
            strategy=strategy,
            precision=precision,
            launcher=launcher,
            topology=topology,
            options=self._options(strategy),
            decisions=tuple(self.decisions.values()),
        )
        sentences = objections(plan)
        if sentences:
            raise IncompatiblePlan("; ".join(sentences))
        return plan

    # -- choosing one kind ---------------------------------------------------------------------

    def _choose(self, kind: str, objections: Callable[[Any], list[str]]) -> Any:
        wanted: str | None = getattr(self.request, kind)
        if kind in self.given:
            candidates: tuple[Entry, ...] = (self.given[kind],)
        elif wanted is None:
            candidates = tuple(
                e for e in self.catalog.entries(kind) if e.spec.priority is not None
            )
        else:
            candidates = self._named(kind, wanted)
        taken, refused = self._sift(candidates, objections)
        spelled = f"the object {self.given[kind].spec.name}" if kind in self.given else wanted
        if not taken:
            raise self._nothing_left(kind, spelled, refused)
        if wanted is None and kind not in self.given:
            entry, why = self._best(kind, taken)
        else:
            entry, why = self._most_specific(taken), "named"
        return self._decide(kind, spelled or "auto", entry, why, refused)

    def _decide(
        self, kind: str, wanted: str, entry: Entry, why: str, refused: Iterable[_Refusal] = ()
    ) -> Any:
        self.decisions[kind] = Decision(
            kind=kind,
            wanted=wanted,
            spec=entry.spec,
            provider=entry.provider,
            why=why,
            rejected=tuple(
                Rejected(name=r.entry.spec.name, provider=r.entry.provider, reason=r.reason)
                for r in refused
            ),
        )
        return entry.spec

    def _named(self, kind: str, name: str) -> tuple[Entry, ...]:
        clash = self.catalog.clash(kind, name)
        if clash is not None:
            raise NameClash(
                f"{kind} '{name}' is declared by both {clash[0].provider} and "
                f"{clash[1].provider}, for the same devices; uninstall one of them, or set "
                "TORCHWEFT_DISABLE_PLUGINS to the plugin that you do not want"
            )
        entries = self.catalog.named(kind, name)
        if not entries:
            raise self._unknown(kind, name)
        return entries

    def _sift(
        self, candidates: Iterable[Entry], objections: Callable[[Any], list[str]]
    ) -> tuple[list[Entry], list[_Refusal]]:
        taken, refused = [], []
        for entry in candidates:
            sentences = objections(entry.spec)
            if sentences:
                refused.append(_Refusal(entry=entry, reason="; ".join(sentences)))
                continue
            answer = probe(entry)
            if answer.ok:
                taken.append(entry)
            else:
                refused.append(_Refusal(entry=entry, reason=answer.reason, hint=answer.hint))
        return taken, refused

    def _most_specific(self, entries: list[Entry]) -> Entry:
        # Entries of one name that do not clash form a chain wherever more than one of them serves.
        return next(
            a for a in entries if not any(narrower(b.spec, a.spec) for b in entries if b is not a)
        )

    def _best(self, kind: str, entries: list[Entry]) -> tuple[Entry, str]:
        top = max(entry.spec.priority or 0 for entry in entries)
        best = [entry for entry in entries if (entry.spec.priority or 0) == top]
        kept = [a for a in best if not any(narrower(b.spec, a.spec) for b in best if b is not a)]
        if len(kept) > 1:
            raise NameClash(
                f"{kind}='auto' could be {kept[0].describe()} or {kept[1].describe()}, which "
                f"declare the same priority; name the {kind} that you want"
            )
        others = len(entries) - 1
        return kept[0], f"highest priority of {others + 1} that can be used" if others else (
            "the only one that can be used"
        )

    # -- errors --------------------------------------------------------------------------------

    def _unknown(self, kind: str, name: str) -> Exception:
        distribution = KNOWN.get((kind, name))
        for plugin in self.catalog.broken:
            if plugin.distribution == distribution:
                return BrokenPlugin(
                    f"{kind} '{name}' cannot be used: plugin '{plugin.plugin}' "
                    f"({plugin.provider}) failed to load: {plugin.error}"
                )
        if distribution is not None:
            return NotAvailable(
                f"{kind} '{name}' is in a package that is not installed; "
                f"try: pip install {distribution}"
            )
        known_elsewhere = (n for k, n in KNOWN if k == kind)
        near = did_you_mean(name, {*self.catalog.names(kind), *known_elsewhere, "auto"}) or ";"
        here = sorted({"auto", *(entry.spec.name for entry in self.catalog.entries(kind))})
        message = f"no {kind} is called '{name}'{near} known here: {', '.join(here)}"
        for plugin in self.catalog.broken:
            message += (
                f"; plugin '{plugin.plugin}' ({plugin.provider}) might have provided it, "
                f"but failed to load: {plugin.error}"
            )
        return UnknownName(message)

    def _nothing_left(
        self, kind: str, wanted: str | None, refused: list[_Refusal]
    ) -> NotAvailable | IncompatiblePlan:
        said = "; ".join(refusal.sentence() for refusal in refused)
        missing = self._missing_package(kind, wanted)
        if wanted is None:
            return NotAvailable(f"no {kind} can be used here{': ' if said else ''}{said}{missing}")
        return NotAvailable(f"{kind} '{wanted}' cannot be used here: {said}{missing}")

    def _missing_package(self, kind: str, wanted: str | None) -> str:
        installed = {plugin.distribution for plugin in self.catalog.declared}
        if wanted is None:
            names = [n for k, n in KNOWN if k == kind and KNOWN[k, n] not in installed]
            # The first in the table is the common one.
            wanted = names[0] if names and kind == "strategy" else None
        distribution = KNOWN.get((kind, wanted or ""))
        if distribution is None or distribution in installed:
            return ""
        return f"; '{wanted}' is also in a package that is not installed; " \
               f"try: pip install {distribution}"

    # -- topology ------------------------------------------------------------------------------

    def _device_count(self, accelerator: Any) -> int:
        """How many devices a node uses, before it is known how processes share them."""
        devices = self.request.devices
        entry = Entry(spec=accelerator, provider=self.decisions["accelerator"].provider)
        there = probe(entry).count
        if devices is None:
            per_node = self.detected[1].processes_per_node if self.detected else None
            default = accelerator.default_devices
            devices = per_node or default
        if devices == "all":
            if there is None:
                raise InvalidRequest(
                    f"devices='all' has no meaning for accelerator '{accelerator.name}', which "
                    "does not count its devices; give a number"
                )
            return there
        if isinstance(devices, tuple):
            if not accelerator.selectable:
                raise InvalidRequest(
                    f"devices={list(devices)} picks single devices, which accelerator "
                    f"'{accelerator.name}' does not have; write devices={len(devices)}"
                )
            missing = [i for i in devices if there is not None and i >= there]
            if missing:
                raise NotAvailable(
                    f"devices={list(devices)} names device {missing[0]}, but accelerator "
                    f"'{accelerator.name}' has {there} here: {_indices(there or 0)}"
                )
            return len(devices)
        if there is not None and devices > there:
            raise NotAvailable(
                f"devices={devices} was asked for, but accelerator '{accelerator.name}' has "
                f"{there} here: {_indices(there)}"
            )
        return int(devices)

    def _nodes(self) -> int | tuple[int, int]:
        asked = self.request.num_nodes
        if not self.detected:
            return asked or 1
        detection = self.detected[1]
        if not detection.world_size or not detection.processes_per_node:
            return asked or 1
        found = -(-detection.world_size // detection.processes_per_node)
        least, most = asked if isinstance(asked, tuple) else (asked or found, asked or found)
        if not least <= found <= most:
            raise InvalidRequest(
                f"num_nodes={asked} was asked for, but {detection.reason} on {found} node(s)"
            )
        return found

    def _topology(
        self, accelerator: Any, strategy: Any, count: int, nodes: int | tuple[int, int]
    ) -> Topology:
        asked = self.request.devices
        indices = asked if isinstance(asked, tuple) else tuple(range(count))
        processes = count if strategy.processes == "device" else 1
        if self.detected:
            launcher, detection = self.detected
            started = detection.processes_per_node
            if started is not None and started != processes:
                raise InvalidRequest(
                    f"devices={asked} needs {processes} process(es) per node, but "
                    f"{detection.reason} with {started}; make the two equal, or leave devices out"
                )
        return Topology(num_nodes=nodes, processes_per_node=processes, devices=indices)

    # -- objections ----------------------------------------------------------------------------

    def _strategy_objections(
        self, spec: StrategySpec, count: int, nodes: int | tuple[int, int]
    ) -> list[str]:
        sentences = self._served(spec)
        most = nodes if isinstance(nodes, int) else nodes[1]
        if spec.processes == "one" and count * most > 1:
            sentences.append(
                f"it runs one process on one device, and {count * most} were asked for"
            )
        return sentences

    def _precision_objections(self, spec: PrecisionSpec) -> list[str]:
        return self._served(spec) + self._exclusive(spec)

    def _launcher_objections(self, spec: LauncherSpec, topology: Topology) -> list[str]:
        sentences = self._served(spec) + self._exclusive(spec)
        if spec.processes == "one" and topology.world_size > 1:
            sentences.append(f"it makes one process, and the plan has {topology.world_size}")
        if spec.processes == "many" and topology.world_size == 1:
            sentences.append("the plan has one process, which needs no launcher")
        if spec.nodes == "one" and topology.max_nodes > 1:
            sentences.append(
                f"it starts processes on this node alone, and the plan has {topology.num_nodes} "
                "nodes; start the script with 'torchweft run --num-nodes … --devices …'"
            )
        if spec.outside and (not self.detected or self.detected[0].spec is not spec):
            sentences.append("this process was not started by it")
        return sentences

    def _served(self, spec: Any) -> list[str]:
        sentences = []
        accelerator: Any = self.decisions["accelerator"].spec
        if spec.devices and accelerator.device not in spec.devices:
            sentences.append(
                f"it serves {_either(spec.devices)}, and the accelerator is '{accelerator.name}'"
            )
        strategy = self.decisions.get("strategy")
        if strategy and spec.strategies and strategy.spec.name not in spec.strategies:
            sentences.append(
                f"it serves the strategies {_either(spec.strategies)}, and the strategy is "
                f"'{strategy.spec.name}'"
            )
        return sentences

    def _exclusive(self, spec: Any) -> list[str]:
        strategy = self.decisions["strategy"].spec
        if spec.kind in strategy.exclusive and strategy.name not in spec.strategies:
            own = sorted(
                entry.spec.name
                for entry in self.catalog.entries(spec.kind)
                if strategy.name in entry.spec.strategies
            )
            return [f"strategy '{strategy.name}' takes only its own: {_either(own) or 'none'}"]
        return []

    # -- launcher ------------------------------------------------------------------------------

    def _detect(self, environ: Mapping[str, str]) -> tuple[Entry, Detection] | None:
        found: list[tuple[Entry, Detection]] = []
        for entry in self.catalog.entries("launcher"):
            spec = entry.spec
            if isinstance(spec, LauncherSpec) and spec.detect:
                answer = load_target(spec.detect, entry.provider)(environ)
                if answer is not None:
                    found.append((entry, answer))
        # An outer launcher that names itself precisely carries the higher priority.
        return max(found, key=lambda pair: pair[0].spec.priority or 0, default=None)

    def _launcher(self, strategy: StrategySpec, topology: Topology) -> LauncherSpec:
        def objections(spec: LauncherSpec) -> list[str]:
            return self._launcher_objections(spec, topology)

        preset = strategy.preset(self.request.strategy or "")
        wished = preset.launcher if preset else None
        asked = self.request.launcher
        if asked is None and "launcher" in self.given:
            asked = self.given["launcher"].spec.name
        if asked and wished and asked != wished:
            raise IncompatiblePlan(
                f"strategy '{self.request.strategy}' starts its processes with launcher "
                f"'{wished}', but launcher='{asked}' was asked for; write "
                f"strategy='{strategy.name}' with launcher='{asked}'"
            )
        if self.detected:
            entry, detection = self.detected
            if asked and asked not in entry.spec.names():
                raise IncompatiblePlan(
                    f"launcher '{asked}' was asked for, but {detection.reason}; leave launcher= "
                    "out, or start the script with python"
                )
            refused = objections(entry.spec)
            if refused:
                raise IncompatiblePlan(f"{detection.reason}, but {'; '.join(refused)}")
            chosen: LauncherSpec = self._decide(
                "launcher", asked or "auto", entry, f"detected: {detection.reason}"
            )
            return chosen
        if wished and not asked:
            entries, refusals = self._sift(self._named("launcher", wished), objections)
            if not entries:
                raise self._nothing_left("launcher", wished, refusals)
            chosen = self._decide(
                "launcher", "auto", entries[0], f"strategy='{self.request.strategy}' needs it"
            )
            return chosen
        chosen = self._choose("launcher", objections)
        return chosen

    # -- options -------------------------------------------------------------------------------

    def _options(self, strategy: StrategySpec) -> Mapping[str, Mapping[str, Any]]:
        options = {kind: dict(chosen) for kind, chosen in self.request.options.items()}
        preset = strategy.preset(self.request.strategy or "")
        if preset and preset.options:
            mine = options.setdefault("strategy", {})
            for key, value in preset.options.items():
                if mine.setdefault(key, value) != value:
                    raise InvalidRequest(
                        f"strategy '{preset.alias}' stands for {key}={value!r}, and the option "
                        f"{key}={mine[key]!r} contradicts it; write '{strategy.name}:{key}=…'"
                    )
        for kind, chosen in options.items():
            # The class is imported only here, so that a request without options stays free of it.
            decision = self.decisions[kind]
            cls = load_target(decision.spec.target, decision.provider)
            check_options(kind, decision.spec.name, cls, chosen)
        return options


def _indices(count: int) -> str:
    return ", ".join(map(str, range(count))) or "none"


def _either(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
