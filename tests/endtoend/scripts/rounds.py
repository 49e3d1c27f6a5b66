"""Goes on until a file appears, and asks for no signal. Arguments: the file."""

import os
import sys
import time
from pathlib import Path

from torchweft import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp")
fabric.launch()
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
fabric.print(f"begins at step 0 with {fabric.world_size} processes, restart {restart}")
while not fabric.all_reduce(float(Path(sys.argv[1]).exists()), reduce_op="max"):
    time.sleep(0.03)
fabric.print(f"ends with {fabric.world_size} processes")
