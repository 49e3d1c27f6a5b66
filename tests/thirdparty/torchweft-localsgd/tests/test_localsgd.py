"""The strategy against the conformance kit of torchweft."""

from __future__ import annotations

from torchweft.testing import PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "localsgd"


class TestLocalSGD(StrategyConformance):
    """Between two averagings every process goes its own way."""

    strategy = "localsgd:period=2"
    tolerance = 0.2
