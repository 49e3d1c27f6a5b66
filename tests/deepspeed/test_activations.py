"""What is computed again in the backward pass in place of being kept, in every way to say so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from torchweft.errors import InvalidRequest, RankFailed
from torchweft.testing import run_ranks
from torchweft.testing.models import loss_of
from torchweft_deepspeed.strategy import DeepSpeedStrategy

WIDTH, ROWS, STEPS = 16, 64, 2
BLOCKS = 4

#: Ways in which a model says so, by torch and by DeepSpeed.
WAYS = ("reentrant", "not reentrant", "deepspeed", "deepspeed, not reentrant")


class Block(nn.Module):
    """A layer with parameters of its own, random numbers, and a buffer that stays in 32-bit."""

    passes = 0
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(4 * WIDTH), nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("shift", torch.full((4 * WIDTH,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        Block.passes += 1
        inside = self.drop(torch.tanh(self.norm(self.up(x))))
        # Under autocast alone does the sum fit the layer, in 16 bits.
        return x + self.scale * self.down(inside + self.shift)


class Deep(nn.Module):
    """Blocks that are computed again as ``how`` says, or kept."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = _called(block, x, self.how)
        output: Tensor = self.last(x)
        return output


def _called(block: Callable[[Tensor], Any], x: Tensor, how: str) -> Any:
    if how in WAYS[:2]:
        return checkpoint(block, x, use_reentrant=how == "reentrant")
    if how:
        from deepspeed import checkpointing

        if how == "deepspeed":
            return checkpointing.checkpoint(block, x)
        return checkpointing.non_reentrant_checkpoint(block, x)
    return block(x)


class Kept(TorchDispatchMode):
    """Notes what is made, and tells how many bytes of it are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        return made

    def bytes(self) -> int:
        return sum(size for storage, size in self._made.items() if not storage.expired())


def trains(fabric: Any, how: str = "") -> dict[str, Any]:
    """Losses and norms of steps of two micro-batches each, and what of a forward pass stays."""
    torch.manual_seed(1)
    Block.passes = 0
    plain = Deep(how)
    made = torch.optim.AdamW(plain.parameters(), lr=0.01)
    model, optimizer = fabric.setup(plain, made)
    told, kept = [], 0
    for step in range(STEPS):
        for index in range(2):
            torch.manual_seed(10 * step + 2 * index + fabric.global_rank)
            x = torch.randn(ROWS, 6)
            with fabric.accumulate(model, steps=2, index=index):
                with Kept() as kept_now:
                    loss = loss_of(model(x), x[:, :3])
                kept = kept_now.bytes()
                fabric.backward(loss)
            told.append(loss.item())
        told.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.5)))
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(0)
    told.append(float(loss_of(model(torch.ones(2, 6)), torch.zeros(2, 3))))
    names = [name for name, _ in plain.named_parameters()]
    return {"told": told, "kept": kept, "passes": Block.passes, "names": names}


def trains_all_ways(fabric: Any) -> dict[str, dict[str, Any]]:
    return {how: trains(fabric, how) for how in ("", *WAYS)}


def trains_made_divided(fabric: Any) -> tuple[list[float], int]:
    """A model that is divided as it is made; without random numbers drawn on the way."""
    with fabric.init_module():
        plain = Deep()
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    model.train()
    Block.passes, losses = 0, []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = loss_of(model(torch.ones(4, 6)), torch.ones(4, 3))
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, Block.passes


STRATEGIES = [f"deepspeed:stage={n},stage3_param_persistence_threshold=0" for n in range(4)]


#: A precision with each stage; ``TORCHWEFT_SOAK=1``: all of them.
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
TOGETHER = list(zip(STRATEGIES, ("32-true", "bf16-mixed", "bf16-true", "bf16-mixed"), strict=True))
if os.environ.get("TORCHWEFT_SOAK") == "1":
    TOGETHER = [(strategy, precision) for strategy in STRATEGIES for precision in PRECISIONS]


@pytest.mark.parametrize(("strategy", "precision"), TOGETHER)
def test_what_is_computed_again_is_the_same_and_takes_less_memory(
    strategy: str, precision: str
) -> None:
    ways = run_ranks(2, trains_all_ways, strategy=strategy, precision=precision)
    option = f"{strategy},activation_checkpointing=Block"
    by_option = run_ranks(2, trains, strategy=option, precision=precision)
    for rank in range(2):
        usual = ways[rank].pop("")
        found = {**ways[rank], "the option": by_option[rank]}
        assert list(found) == [*WAYS, "the option"]
        for how, one in found.items():
            assert one["told"] == usual["told"], how
            assert one["kept"] < usual["kept"] / 2, how
            # Of one block after the other, twice in every step, and once behind the last one.
            assert (usual["passes"], one["passes"]) == (BLOCKS * 5, BLOCKS * 9), how
            assert one["names"] == usual["names"], how


@pytest.mark.parametrize("choice", [Block, (Block, nn.Embedding), "Block"])
def test_modules_are_chosen_as_with_fsdp(choice: Any) -> None:
    strategy = DeepSpeedStrategy(stage=3, activation_checkpointing=choice)
    told = run_ranks(2, trains_made_divided, strategy=strategy)
    usual = run_ranks(2, trains_made_divided, strategy="deepspeed_stage_3")
    assert [passes for _, passes in told] == [2 * STEPS * BLOCKS] * 2
    assert [passes for _, passes in usual] == [STEPS * BLOCKS] * 2
    assert [losses for losses, _ in told] == [losses for losses, _ in usual]


def test_deepspeeds_own_options_beside() -> None:
    options = "number_checkpoints=4,synchronize_checkpoint_boundary=true"
    for strategy in (STRATEGIES[1], STRATEGIES[3]):
        told = run_ranks(2, trains, "deepspeed", strategy=f"{strategy},{options}")[0]
        usual = run_ranks(2, trains, strategy=strategy)[0]
        assert told["told"] == usual["told"]
        assert told["kept"] < usual["kept"] / 2


def configured(fabric: Any) -> list[Any]:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    return [checkpointing.SYNCHRONIZE, checkpointing.num_layers, checkpointing.PROFILE_TIME]


def test_deepspeed_is_told_its_options() -> None:
    strategy = DeepSpeedStrategy(
        synchronize_checkpoint_boundary=True,
        number_checkpoints=4,
        config={"activation_checkpointing": {"profile": True}},
    )
    assert run_ranks(1, configured, strategy=strategy) == [[True, 4, True]]


# -- what cannot be --------------------------------------------------------------------------------


def test_an_object_is_refused_before_the_model_is_made() -> None:
    words = "was asked for cpu_checkpointing, which moves activations to the memory of the host"
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, trains, strategy=DeepSpeedStrategy(cpu_checkpointing=True))


def test_a_choice_of_nothing_lists_the_classes() -> None:
    words = re.escape(
        "strategy 'deepspeed' was given activation_checkpointing=Blok, which chooses no part of "
        "Deep; did you mean 'Block'? its modules are of the classes Block, Dropout, LayerNorm, "
        "Linear, ModuleList"
    )
    with pytest.raises(RankFailed, match=words):
        run_ranks(2, trains, strategy="deepspeed:activation_checkpointing=Blok")


def test_what_is_no_choice() -> None:
    words = re.escape(
        "strategy 'deepspeed' was given activation_checkpointing=3; it takes names of classes "
        "joined by '+', such as activation_checkpointing=Block+Embedding, classes of modules, or a "
        "function of a module"
    )
    with pytest.raises(InvalidRequest, match=words):
        DeepSpeedStrategy(activation_checkpointing=3)  # type: ignore[arg-type]
