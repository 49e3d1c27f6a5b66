"""The strategy against the conformance kit of torchweft."""

from __future__ import annotations

from torchweft.testing import PluginConformance, StrategyConformance


class TestPlugin(PluginConformance):
    plugin = "acme"


class TestAcme(StrategyConformance):
    strategy = "acme"


class TestAcmeCompressed(StrategyConformance):
    """Gradients are sent in bfloat16, which has three digits."""

    strategy = "acme_compressed"
    devices = (2,)
    tolerance = 0.05
