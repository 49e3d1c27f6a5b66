"""Which launcher has already made this process, as its environment tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchweft.catalog import Catalog, Entry
from torchweft.errors import InvalidRequest, NameClash
from torchweft.plan import Rejected
from torchweft.specs import Detection, LauncherSpec, load_target

__all__ = ["Detected", "detect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """What the launchers' detections said.

    Attributes:
        entry: the launcher that made this process; None when nobody did.
        detection: what it said.
        failed: launchers whose detection failed, so that nothing is known of them.
        others: launchers that made a process further out, and why they do not count.
    """

    entry: Entry | None = None
    detection: Detection | None = None
    failed: tuple[Rejected, ...] = ()
    others: tuple[Rejected, ...] = ()


def detect(catalog: Catalog, environ: Mapping[str, str], wanted: str | None) -> Detected:
    """Ask every launcher; ``wanted``, the name that was asked for, wins over others that answer.

    Where several answer, as torchrun in a batch job of another scheduler, the higher priority
    wins: the launcher nearest to the process carries it. Raises ``NameClash`` where that decides
    nothing, and what a detection raises on purpose, unless one that counts more answered. What made
    one process from outside does not count where another launcher is asked for.
    """
    found: list[tuple[Entry, Detection]] = []
    refused: list[tuple[Entry, InvalidRequest]] = []
    failed: list[Rejected] = []
    for entry in catalog.entries("launcher"):
        spec: Any = entry.spec
        if spec.detect:
            try:
                answer = _ask(spec, entry.provider, environ)
            except InvalidRequest as error:
                # What is wrong with the environment is the user's to know, a defect is not.
                refused.append((entry, error))
                continue
            except _DetectionError as error:
                failed.append(Rejected(name=spec.name, provider=entry.provider, reason=str(error)))
                continue
            if answer is not None:
                found.append((entry, answer))
    for entry, complaint in refused:
        if all(_weight(entry, wanted) >= _weight(other, wanted) for other, _ in found):
            raise complaint
    if not found:
        return Detected(failed=tuple(failed))
    entry, detection = _nearest(found, wanted)
    launcher: Any = entry.spec
    if wanted and wanted not in launcher.names() and launcher.outside and detection.world_size == 1:
        # One process may become several by another launcher, where that is asked for.
        reason = f"{detection.reason}, once, and launcher '{wanted}' was asked for"
        alone = Rejected(name=launcher.name, provider=entry.provider, reason=reason)
        return Detected(failed=tuple(failed), others=(alone,))
    return Detected(
        entry=entry,
        detection=detection,
        failed=tuple(failed),
        others=tuple(
            Rejected(
                name=other.spec.name,
                provider=other.provider,
                reason=f"{said.reason} too, but {_why_first(entry, other, wanted)}",
            )
            for other, said in found
            if other is not entry
        ),
    )


def _weight(entry: Entry, wanted: str | None) -> tuple[bool, int]:
    """Of several launchers that answer, the heaviest counts."""
    return wanted in entry.spec.names(), entry.spec.priority or 0


def _why_first(entry: Entry, other: Entry, wanted: str | None) -> str:
    named, priority = _weight(entry, wanted)
    if named:
        return f"'{entry.spec.name}' was asked for"
    return (
        f"'{entry.spec.name}' is nearer to it: priority {priority} over {_weight(other, None)[1]}"
    )


class _DetectionError(Exception):
    """A detection that did not answer."""


def _ask(spec: LauncherSpec, provider: str, environ: Mapping[str, str]) -> Detection | None:
    try:
        answer: Any = load_target(spec.detect, provider)(environ)
    except InvalidRequest:
        raise
    except (Exception, SystemExit) as error:
        raise _DetectionError(
            f"its detection '{spec.detect}' failed: {type(error).__name__}: {error}"
        ) from error
    if answer is None or isinstance(answer, Detection):
        return answer
    raise _DetectionError(
        f"its detection '{spec.detect}' returned {answer!r} instead of a Detection"
    )


def _nearest(found: list[tuple[Entry, Detection]], wanted: str | None) -> tuple[Entry, Detection]:
    top = max(_weight(entry, wanted) for entry, _ in found)
    best = [pair for pair in found if _weight(pair[0], wanted) == top]
    if len(best) > 1:
        (first, one), (second, other) = best[:2]
        raise NameClash(
            f"{one.reason} according to launcher {first.describe()}, and {other.reason} according "
            f"to launcher {second.describe()}; say which it is with launcher='…' or "
            "TORCHWEFT_LAUNCHER"
        )
    return best[0]
