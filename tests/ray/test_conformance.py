"""Launcher ``ray`` is right, and its plugin keeps what every plugin promises."""

from __future__ import annotations

import pytest

from torchweft.testing import LauncherConformance, PluginConformance


class TestRay(LauncherConformance):
    launcher = "ray"

    @pytest.fixture(autouse=True)
    def on_the_cluster(self, cluster: str) -> None:
        type(self).environ = {"RAY_ADDRESS": cluster}


class TestPlugin(PluginConformance):
    plugin = "ray"
