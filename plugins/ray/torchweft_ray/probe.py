"""Whether Ray is installed, without importing it."""

from __future__ import annotations

from importlib import metadata

from torchweft.specs import Availability

__all__ = ["ray"]


def ray() -> Availability:
    """Ray is there; whether a cluster can be reached is for ``launch()`` to find out."""
    # Not find_spec: a folder of that name, as many projects have one, would pass for a package.
    try:
        metadata.version("ray")
    except metadata.PackageNotFoundError:
        return Availability(
            ok=False,
            reason="the package ray is not installed",
            hint="pip install ray, where there is one for this Python",
        )
    return Availability(ok=True)
