"""Constructs a Fabric with the arguments given as JSON, and says what was decided."""

import json
import os
import sys

from torchweft import Fabric

fabric = Fabric(**json.loads(sys.argv[1]))
fabric.launch()
plan = fabric.plan
said = [
    fabric.global_rank,
    fabric.world_size,
    plan.strategy.name,
    plan.precision.name,
    plan.launcher.name,
    dict(plan.options.get("strategy", {})),
]
os.write(1, (json.dumps(said) + "\n").encode())
