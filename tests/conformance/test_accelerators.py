"""Every accelerator of the core and of torchweft-cuda is right, where there is one."""

from __future__ import annotations

from torchweft.testing import AcceleratorConformance


class TestCPU(AcceleratorConformance):
    accelerator = "cpu"


class TestMPS(AcceleratorConformance):
    accelerator = "mps"


class TestCUDA(AcceleratorConformance):
    accelerator = "cuda"
