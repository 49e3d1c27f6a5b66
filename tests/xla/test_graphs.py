"""One graph a step, counted with torch-xla's own metrics, and the lines that spoil it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.xla.scripts import script, told

#: Trains for ``STEPS`` steps and tells the counts behind each; ``EXTRA`` is in the loop.
LOOP = """
import torch_xla.debug.metrics as metrics

STRATEGY, STEPS = "{strategy}", {steps}
warnings.simplefilter("always")

fabric = Fabric(accelerator="xla", strategy=STRATEGY)
fabric.launch()
fabric.seed_everything(1)
net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
model, optimizer = fabric.setup(net, optimizer)
count = STEPS * 4 * fabric.num_replicas
data = TensorDataset(torch.randn(count, 8), torch.randint(4, (count,)))


def collate(rows):
    x, y = (torch.stack(each) for each in zip(*rows))
    {collate}
    return x, y


loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4, collate_fn=collate))


def counts():
    transfers = metrics.metric_data("TransferFromDeviceTime")
    return {{
        "compiled": metrics.counter_value("UncachedCompile") or 0,
        "scalars": metrics.counter_value("aten::_local_scalar_dense") or 0,
        "transfers": transfers[0] if transfers else 0,
    }}


def graphs():
    run = metrics.metric_data("ExecuteReplicatedTime") or metrics.metric_data("ExecuteTime")
    return run[0] if run else 0


by_step, losses, scale = [], [], 1.0
for step, (x, y) in enumerate(loader):
    by_step.append(counts())
    x = x[:, :8]
    loss = nn.functional.cross_entropy(model(x), y)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    losses.append(loss.detach())
    {extra}
by_step.append(counts())
fabric.accelerator.synchronize()
tell(by_step=by_step, graphs=graphs(), replicas=fabric.num_replicas)
tell(losses=torch.stack(losses).tolist())
"""

EVALUATION = """
model.eval()
right, before, ran = torch.zeros((), device=fabric.device), counts(), graphs()
with torch.no_grad():
    for _ in range(4):
        for x, y in loader:
            right += (model(x).argmax(1) == y).sum()
fabric.accelerator.synchronize()
tell(before=before, after=counts(), evaluated=graphs() - ran, right=right.item())
"""


def loop(strategy: str = "xla", steps: int = 50, collate: str = "", extra: str = "") -> str:
    return LOOP.format(
        strategy=strategy, steps=steps, collate=collate or "pass", extra=extra or "pass"
    )


@pytest.mark.parametrize(
    ("strategy", "devices"), [("xla", 1), ("xla", 4), ("xla_fsdp", 4), ("single_xla", 1)]
)
def test_fifty_steps_and_an_evaluation(strategy: str, devices: int, tmp_path: Path) -> None:
    """A graph for each batch, at most two compilations after the first step, no transfer."""
    found = told(script(loop(strategy) + EVALUATION, tmp_path, devices=devices))
    assert found["replicas"] == devices
    first, last = found["by_step"][1], found["by_step"][-1]
    assert last["compiled"] - first["compiled"] <= 2
    assert last["scalars"] == last["transfers"] == 0
    assert 50 <= found["graphs"] <= 52
    # 200 batches.
    assert 200 <= found["evaluated"] <= 202
    assert found["after"]["compiled"] - found["before"]["compiled"] <= 2
    # The sum of the losses was read in between.
    assert found["after"]["scalars"] == found["before"]["scalars"]
    assert 0 < found["right"] <= 4 * 200 * devices


def warned(text: str, tmp_path: Path, devices: int = 2) -> list[str]:
    done = script(text, tmp_path, devices=devices)
    assert done.returncode == 0, done.stderr
    return re.findall(r"UserWarning: (.*)", done.stderr)


def line_of(tmp_path: Path, part: str) -> str:
    lines = (tmp_path / "train.py").read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if part in line]
    assert len(found) == 1, found
    return f"{tmp_path / 'train.py'}:{found[0]}"


def test_a_constant_loop_is_told_nothing(tmp_path: Path) -> None:
    assert warned(loop(steps=20) + EVALUATION, tmp_path) == []


@pytest.mark.parametrize(
    "extra",
    ["scale = loss.item()", "scale = loss.cpu()", "scale = 1.0 if loss > 3 else 2.0"],
)
def test_a_transfer_in_every_step_is_told_with_its_line(extra: str, tmp_path: Path) -> None:
    (said,) = warned(loop(steps=20, extra=extra), tmp_path)
    where = line_of(tmp_path, extra)
    assert said == (
        f"every step waits for the XLA device at {where}: a value is read there, for which the "
        "graph is cut in two and the device left idle; keep tensors (loss.detach()), and read "
        "them now and then"
    )


def test_a_value_that_is_read_now_and_then_is_no_habit(tmp_path: Path) -> None:
    assert warned(loop(steps=20, extra="step % 5 or print(loss.item())"), tmp_path) == []


def test_what_is_compiled_in_every_step_is_told_with_its_line(tmp_path: Path) -> None:
    extra = "scale = torch.zeros(step + 1, device=fabric.device).sum()"
    (said,) = warned(loop(steps=20, extra=extra), tmp_path)
    where = line_of(tmp_path, extra)
    assert said == (
        f"every step compiles a graph anew for XLA, because of what changes at {where}; give "
        "tensors the same shape in every step (fill them up), and pass a number that changes as "
        "a tensor"
    )


def test_a_number_that_changes_compiles_nothing_anew(tmp_path: Path) -> None:
    """As the learning rate, in every script."""
    text = loop(steps=12, extra="scale *= 0.9; losses[-1] = losses[-1] * scale")
    done = script(text, tmp_path, devices=2)
    by_step = told(done)["by_step"]
    assert by_step[-1]["compiled"] == by_step[4]["compiled"]


def test_batches_of_changing_shape_are_told_once_with_the_shapes(tmp_path: Path) -> None:
    collate = "x = torch.cat([x, x.new_zeros(len(x), int(y.sum()) % 31)], 1)"
    first, *rest = warned(loop(steps=20, collate=collate), tmp_path)
    assert first.startswith("the last 6 different batches have as many shapes ((8, ")
    assert "(8,); (8, " in first
    assert first.endswith(
        "and XLA compiles a graph for each, which takes seconds to minutes; have the loader's "
        "collate_fn fill tensors up to a few sizes"
    )
    # What takes the batch first, perhaps.
    assert len(rest) <= 1


def test_the_next_batch_is_fetched_once_the_step_was_sent_off(tmp_path: Path) -> None:
    """The device computes meanwhile: each batch is put together behind one more graph."""
    collate = 'fetched.append(metrics.counter_value("MarkStep") or 0)'
    text = "fetched = []\n" + loop(steps=10, collate=collate) + "tell(fetched=fetched)\n"
    fetched = told(script(text, tmp_path, devices=2))["fetched"]
    assert fetched == list(range(1, 11))


def test_a_line_that_is_not_found_is_not_looked_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torchweft_xla import watching

    compiled = itertools.count()
    monkeypatch.setattr(watching, "_counts", lambda: (0, next(compiled)))
    watch, watched = watching.Watch(), 0
    for _ in range(30):
        watch.ended()
        watched += watch._recorder is not None
    assert watched == watching.WATCHED
    assert watch._recorder is None
