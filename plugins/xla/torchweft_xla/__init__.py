"""XLA devices, TPUs above all, for torchweft."""

__version__ = "0.1.0"
