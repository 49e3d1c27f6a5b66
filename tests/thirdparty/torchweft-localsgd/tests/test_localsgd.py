"""The strategy against the conformance kit of torchweft."""

from __future__ import annotations

from torchweft.testing import PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "localsgd"


class TestEveryStep(StrategyConformance):
    """Averaged after every step; Adam's steps are not linear in the gradient."""

    strategy = "localsgd:period=1"
    tolerance = 0.15


class TestEveryOtherStep(StrategyConformance):
    """In between, every process goes its own way."""

    strategy = "localsgd:period=2"
    tolerance = 0.2
