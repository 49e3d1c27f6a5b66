"""Ranks on a Ray cluster, for torchweft."""

__version__ = "0.1.0"
