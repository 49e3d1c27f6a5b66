"""DeepSpeed ZeRO, stages 0 to 3 and offload, for torchweft."""

__version__ = "0.1.0"
