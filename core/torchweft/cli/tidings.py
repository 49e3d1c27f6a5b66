"""What the commands of several nodes tell each other, through a store of theirs, while they run.

torch's agent tells no other node that its ranks failed: those of the others wait for them until
some timeout of half an hour, or say no more than that a connection was closed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torchweft.errors import TorchweftError

__all__ = ["News", "Tidings"]

_TICK = 0.5
#: Seconds that a node may say nothing before it counts as lost.
_SILENCE = 30.0
#: Seconds in which ranks that lose others of another node fail by themselves.
_MOMENT = 2.0
#: Seconds for which a node whose ranks only lost others waits for word of the cause. Together with
#: those in which its ranks end it stays below the five in which a run is over.
_PATIENCE = 3.0
#: Seconds in which all nodes have looked for a failure, and the one that serves the store can go.
_HEARD = 1.0
#: Seconds in which all nodes, and those that stand by, know that the run is over.
_OVER = 2.5
_FIRST = "failure/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Why a node's part of the run ended.

    Attributes:
        node: its number, or another name that is its own.
        where: how a person finds it; empty where it tells no more than this.
        text: the cause.
    """

    node: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.text}\nin full in the output of {self.where}" if self.where else self.text


class Tidings:
    """One node's end of it.

    Args:
        join: gives the store, once it is served; None: there is one node, or no such store.
        node: number of this node, or another name that is its own.
        stop: ends this node's part of the run; called from a thread.
        serves: whether the store is served by this process.
        nodes: how many there are, with numbers from 0, of which 0 serves; each is missed where it
            says nothing any more. 0: they come and go, and nobody is missed.

    Attributes:
        news: why the run has to end here too.
        well: whether it ended well here.
    """

    def __init__(
        self,
        join: Callable[[], Any] | None,
        node: str,
        stop: Callable[[], None],
        *,
        serves: bool,
        nodes: int = 0,
    ) -> None:
        self.news: News | None = None
        self.well = False
        self._told = False
        self._join = join
        self._node = node
        self._stop = stop
        self._serves = serves
        self._nodes = nodes
        self._store: Any = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        if join is not None:
            threading.Thread(target=self._watch, name="tidings", daemon=True).start()
            if nodes and not serves:
                threading.Thread(target=self._mind, name="silence", daemon=True).start()

    @property
    def shared(self) -> bool:
        """Whether there are others to tell."""
        return self._join is not None

    def fail(self, text: str) -> None:
        """Tell the others why this node's part of the run ended."""
        self._over.set()
        where = f"node {self._node} ({socket.gethostname()})" if self._nodes else self._node
        news = News(node=self._node, where=where, text=text)
        with self._open() as store:
            if store is not None:
                self._told = True
                store.set(f"failure/{store.add('failures', 1)}", json.dumps(asdict(news)))

    def cause(self, *, waited: bool = False) -> News | None:
        """What another node told, if it has or does so within moments.

        ``waited``: whether this node has waited for such already.
        """
        self._over.set()
        patience = _TICK if waited else _PATIENCE
        deadline = time.monotonic() + (patience if self._store is not None else 0)
        while self.news is None and time.monotonic() < deadline:
            with self._open() as store:
                self.news = self._read(store)
            time.sleep(0.05)
        return self.news

    def close(self) -> None:
        """This node leaves; the one that serves the store, once the others know that it is over."""
        self._over.set()
        with self._open() as store:
            if store is None:
                return
            store.set(f"left/{self._node}", "")
            if self._serves and (self._nodes or self._told or self.well):
                others = {f"left/{node}" for node in self._others(store)}
                store.wait(sorted(others), timedelta(seconds=_OVER if self.well else _HEARD))

    def _others(self, store: Any) -> list[str]:
        if self._nodes:
            everybody = [str(number) for number in range(self._nodes)]
        else:
            everybody = store.get("members").decode().split()
        return [node for node in everybody if node != self._node]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The store, for one thread at a time; what fails in it, or hangs there, is left undone."""
        if not self._lock.acquire(timeout=_PATIENCE):
            yield None
            return
        try:
            with contextlib.suppress(RuntimeError):  # it went
                yield self._store
        finally:
            self._lock.release()

    def _read(self, store: Any) -> News | None:
        if store is None or not store.check([_FIRST]):
            return None
        news = News(**json.loads(store.get(_FIRST)))
        return news if news.node != self._node else None

    def _watch(self) -> None:
        """Until the run is over here: say that this node lives, look for news and for silence."""
        beats: dict[str, tuple[int, float]] = {}
        news: News | None = None
        try:
            store = self._joined()
            while news is None and not self._over.wait(_TICK):
                with self._lock:
                    news = self._look(store, beats)
                self._heard = time.monotonic()
        except Exception:  # the store went, and whoever served it with it
            news = self._gone("0", "has gone, and its command with it") if self._nodes else None
        if news is not None:
            self._end(news)

    def _joined(self) -> Any:
        """The store, in which this node is known from here on."""
        assert self._join is not None
        while True:
            try:
                store = self._join()
                break
            except TorchweftError:
                if self._over.wait(_TICK):
                    raise
        store.append("members", f"{self._node} ")
        with self._lock:
            self._store = store
        return store

    def _mind(self) -> None:
        """Where the network or node 0 went without a word, the other thread hangs in the store."""
        while not self._over.wait(_TICK):
            if time.monotonic() - self._heard > _SILENCE:
                self._end(self._gone("0", f"has not been heard of for {_SILENCE:g} s"))
                return

    def _end(self, news: News) -> None:
        if self._over.is_set():
            return
        self.news = news
        # Ranks that lose others by it fail by themselves, and say what they were doing.
        if not self._over.wait(_MOMENT):
            self._stop()

    def _look(self, store: Any, beats: dict[str, tuple[int, float]]) -> News | None:
        news = self._read(store)
        done = self._nodes > 0 and not self._serves and store.check(["left/0"])
        if news is not None or done:
            # All that this node can learn: it needs the store no more.
            store.set(f"left/{self._node}", "")
            if done and news is None:
                self._over.set()
            return news
        if not self._nodes:
            return None
        store.add(f"beat/{self._node}", 1)
        return self._missed(store, beats) if self._serves else None

    def _missed(self, store: Any, beats: dict[str, tuple[int, float]]) -> News | None:
        now = time.monotonic()
        for node in self._others(store):
            beat = store.add(f"beat/{node}", 0)
            before, since = beats.get(node, (0, now))
            if beat != before or node not in beats:
                beats[node] = beat, now
            elif now - since > _SILENCE and not store.check([f"left/{node}"]):
                return self._gone(node, f"has not been heard of for {_SILENCE:g} s")
        return None

    def _gone(self, node: str, what: str) -> News:
        text = (
            f"node {node} of {self._nodes} {what}; see whether its computer, the network or its "
            "command was ended"
        )
        return News(node=node, where="", text=text)
