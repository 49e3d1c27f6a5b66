"""Several hosts on one computer: network namespaces that a bridge joins."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Host", "hosts", "why_no_hosts"]


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace with an address of its own.

    Attributes:
        name: of the namespace.
        address: by which the others reach it.
        inner: its end of the cable.
    """

    name: str
    address: str
    inner: str

    def command(self, *command: str) -> list[str]:
        """The same, there."""
        return ["ip", "netns", "exec", self.name, *command]

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without its cable: nothing comes from it, not even that something was closed."""
        _ip("-n", self.name, "link", "set", self.inner, "down")
        try:
            yield
        finally:
            _ip("-n", self.name, "link", "set", self.inner, "up")


def why_no_hosts() -> str:
    """Why there can be none here; empty where there can."""
    if shutil.which("ip") is None:
        return "network namespaces need the command 'ip' (iproute2)"
    name = f"tw{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"the kernel allows no network namespace here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """That many, joined by veth pairs on one bridge; gone at the end."""
    mark = f"{os.getpid() % 100000}"
    bridge = f"twb{mark}"
    made = [
        Host(f"tw{mark}-{n}", f"10.77.{os.getpid() % 250}.{n + 1}", f"twv{mark}i{n}")
        for n in range(count)
    ]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for n, host in enumerate(made):
            outer, inner = f"twv{mark}o{n}", host.inner
            _ip("netns", "add", host.name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", host.name)
            _ip("link", "set", outer, "master", bridge, "up")
            inside = ("-n", host.name)
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", inner)
            _ip(*inside, "link", "set", inner, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
