"""Training code in ``run`` of a subclass. Usage: subclass.py LAUNCHER."""

import sys

import torch

from torchweft import Fabric


class Training(Fabric):
    def run(self, size, *, scale=1):
        if scale == 0:
            return super().run()
        model = self.setup(torch.nn.Linear(size, 1, bias=False))
        with torch.no_grad():
            model.weight.fill_(self.global_rank + 1)
        total = self.all_reduce(model.weight.sum().detach(), reduce_op="sum") * scale
        return self.global_rank, self.world_size, total


class Special(Training):
    def run(self, size):
        return super().run(size, scale=10)


if __name__ == "__main__":
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "launcher": sys.argv[1]}
    rank, world_size, total = Training(**options).run(3)
    print("training", rank, world_size, total.item())
    rank, world_size, total = Special(**options).run(4)
    print("special", rank, world_size, total.item())
    print("alone", Training(accelerator="cpu", devices=1).run(2, scale=2))
    Training(**options).run(1, scale=0)
