"""The plugins of this repository keep what every plugin promises."""

from __future__ import annotations

from torchweft.testing import PluginConformance


class TestBuiltin(PluginConformance):
    plugin = "builtin"


class TestCuda(PluginConformance):
    plugin = "cuda"
