"""The strategy against the conformance kit of torchweft."""

from __future__ import annotations

from torchweft.testing import PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "acme"


class TestAcme(StrategyConformance):
    strategy = "acme"
