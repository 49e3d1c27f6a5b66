"""Every launcher of the core is right."""

from __future__ import annotations

from torchweft.testing import LauncherConformance


class TestInline(LauncherConformance):
    launcher = "inline"


class TestScript(LauncherConformance):
    launcher = "script"


class TestFork(LauncherConformance):
    launcher = "fork"


class TestSpawn(LauncherConformance):
    launcher = "spawn"


class TestForkServer(LauncherConformance):
    launcher = "forkserver"


class TestTorchrun(LauncherConformance):
    launcher = "torchrun"
    command = (
        "{python}",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node={n}",
        "{script}",
    )


class TestTheCommand(LauncherConformance):
    launcher = "torchrun"
    command = ("{python}", "-m", "torchweft", "run", "--devices={n}", "{script}")
