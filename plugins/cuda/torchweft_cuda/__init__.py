"""NVIDIA GPUs and torch's own data-parallel strategies for torchweft."""

__version__ = "0.1.0"
