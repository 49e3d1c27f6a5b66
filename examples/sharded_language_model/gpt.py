"""A small GPT that says how its layers are divided between processes."""

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.nn import functional


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, both with a residual connection."""

    def __init__(self, width, heads):
        super().__init__()
        self.head_width = width // heads
        self.norm_1 = nn.LayerNorm(width)
        # Query, key and value of the first head, then those of the second, and so on: a part of
        # the outputs, such as the first half, is that of whole heads.
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def attend(self, x):
        qkv = self.qkv(x)
        batch, length, _ = qkv.shape
        # As many heads as this process computes, which the width of qkv tells.
        query, key, value = qkv.view(batch, length, -1, 3, self.head_width).unbind(3)
        x = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.out(x.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x):
        x = x + self.attend(self.norm_1(x))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens and those that follow them, (batch, length) up to ``context``, to the mean loss.

    One weight is both the embedding and the head.
    """

    def __init__(self, vocabulary, context, width=128, depth=4, heads=4, sequence_parallel=False):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight
        self.apply(self._initialise)
        # A residual stream keeps its size however many blocks add to it.
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * depth) ** 0.5)

    @staticmethod
    def _initialise(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens, following):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), following.flatten())

    def parallelize(self, mesh):
        """What strategy fsdp divides by ``tensor=``: heads, hidden units and words.

        Under ``sequence_parallel`` each process computes the normalisations of a part of every
        sequence too, and keeps that part alone between the layers.
        """
        between = Shard(1) if self.sequence_parallel else Replicate()
        plan = {
            "token": RowwiseParallel(input_layouts=Replicate()),
            "blocks.*.qkv": ColwiseParallel(input_layouts=between),
            "blocks.*.out": RowwiseParallel(output_layouts=between),
            "blocks.*.up": ColwiseParallel(input_layouts=between),
            "blocks.*.down": RowwiseParallel(output_layouts=between),
            "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
        }
        if self.sequence_parallel:
            plan["blocks"] = PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=between, use_local_output=True
            )
            for name in ("blocks.*.norm_1", "blocks.*.norm_2", "norm"):
                plan[name] = SequenceParallel()
        return plan
