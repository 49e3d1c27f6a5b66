from __future__ import annotations

import pytest

from torchweft.known import COMMON, KNOWN
from torchweft.specs import KINDS


@pytest.mark.parametrize(("asked", "distribution"), KNOWN.items())
def test_what_is_known_can_be_asked_for_and_installed(
    asked: tuple[str, str], distribution: str
) -> None:
    kind, name = asked
    assert kind in KINDS
    assert name == name.lower().strip()
    assert distribution.startswith("torchweft-")


@pytest.mark.parametrize(("kind", "name"), COMMON.items())
def test_what_is_suggested_is_known(kind: str, name: str) -> None:
    assert (kind, name) in KNOWN


@pytest.mark.parametrize(
    ("kind", "name", "distribution"),
    [
        ("accelerator", "gpu", "torchweft-cuda"),
        ("accelerator", "tpu", "torchweft-xla"),
        ("strategy", "ddp_spawn", "torchweft-cuda"),
        ("strategy", "deepspeed_stage_3", "torchweft-deepspeed"),
        ("precision", "16-mixed", "torchweft-cuda"),
        ("launcher", "ray", "torchweft-ray"),
    ],
)
def test_names_that_users_bring(kind: str, name: str, distribution: str) -> None:
    assert KNOWN[kind, name] == distribution
