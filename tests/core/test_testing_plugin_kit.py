from __future__ import annotations

from typing import Any

import pytest

from torchweft.discovery import discover
from torchweft.manager import Manager
from torchweft.testing import plugin_kit
from torchweft.testing.plugin_kit import PluginKit, parameters_of


def kit(name: str) -> PluginKit:
    installed, manager = discover(), Manager({})
    for found in installed:
        manager.add(found)
    return PluginKit(name, installed, manager)


def test_what_there_is_to_ask_of_a_plugin() -> None:
    cuda = kit("cuda")
    assert cuda.declared is not None
    assert cuda.names == ["builtin", "cuda"] or {"builtin", "cuda"} < set(cuda.names)
    labels = {name: [each.label for each in of] for name, of in parameters_of(cuda).items()}
    assert labels["declared_entry"][:2] == ["accelerator-cuda", "strategy-ddp"]
    assert labels["probed_entry"] == ["accelerator-cuda"]
    assert labels["probe_target"] == ["torchweft_cuda.probe:cuda"]
    assert labels["detect_target"] == []
    assert "ddp_spawn" in labels["preset"]
    assert "torch._dynamo" in labels["preload"]
    assert cuda.hooks == {
        "torchweft_accelerators",
        "torchweft_strategies",
        "torchweft_precisions",
        "torchweft_check_plan",
    }


def test_a_plugin_that_is_not_installed_has_nothing() -> None:
    nobody = kit("nobody")
    assert (nobody.found, nobody.declared, nobody.entries) == ([], None, ())
    assert set(map(len, parameters_of(nobody).values())) == {0}


def test_a_trial_that_takes_for_ever_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fresh_interpreter(code: str, **options: Any) -> None:
        tried.append(code)
        raise TimeoutError("not done after 60 s; a stack")

    monkeypatch.setattr(plugin_kit, "fresh_interpreter", fresh_interpreter)
    cuda = kit("cuda")
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match=r"not done after 60 s; a stack$"):
            _ = cuda.with_torch
    (code,) = tried
    assert "with_torch(" in code


def test_a_trial_that_ends_early_tells_how() -> None:
    report = plugin_kit._try("no_such_function")
    assert report.ended.startswith("it ended early, status 1\n")
    assert "cannot import name 'no_such_function'" in report.ended
