"""Draws mesh.svg: which rank of eight holds what, with ``fsdp:replicate=2,shard=2,tensor=2``.

``python docs/images/mesh.py`` writes it beside this file. Needs matplotlib.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

REPLICATE = SHARD = TENSOR = 2

#: By (shard, tensor): what the ranks of a colour hold is the same in every copy.
COLOURS = {(0, 0): "#9ecae1", (0, 1): "#fdd0a2", (1, 0): "#4292c6", (1, 1): "#f79646"}
INK = "#222222"
BOX = (1.85, 1.25)


def ranks():
    """Each rank with its indices: the last dimension varies fastest."""
    for rank in range(REPLICATE * SHARD * TENSOR):
        pair, tensor = divmod(rank, TENSOR)
        replicate, shard = divmod(pair, SHARD)
        yield rank, replicate, shard, tensor


def part(layer, shard, tensor):
    """Of a weight, outputs downwards and inputs to the right: left, top, width, height."""
    if layer == "up":
        # The outputs are divided by tensor, and each of these parts is sharded.
        return 0, (tensor * SHARD + shard) / (TENSOR * SHARD), 1, 1 / (TENSOR * SHARD)
    if layer == "down":
        # The inputs are divided by tensor; outputs are sharded.
        return tensor / TENSOR, shard / SHARD, 1 / TENSOR, 1 / SHARD
    return 0, shard / SHARD, 1, 1 / SHARD


def main():
    """Write the picture."""
    mpl.rcParams.update(
        {"font.size": 11, "font.family": "sans-serif", "svg.fonttype": "path", "svg.hashsalt": "0"}
    )
    figure = Figure(figsize=(11.5, 5.1), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11.5)
    axes.set_ylim(-0.6, 4.5)
    axes.axis("off")
    draw_ranks(axes)
    draw_weights(axes)
    folder = Path(__file__).parent
    figure.savefig(folder / "mesh.svg", metadata={"Date": None, "Creator": None})


def draw_ranks(axes):
    """The ranks as a grid, coloured by what they hold."""
    left, top = 0.95, 3.35
    width, height = BOX
    for rank, replicate, shard, tensor in ranks():
        x = left + replicate * (2 * width + 0.35) + tensor * width
        y = top - (shard + 1) * height
        box = Rectangle((x, y), width, height, facecolor=COLOURS[shard, tensor], edgecolor=INK)
        axes.add_patch(box)
        middle = x + width / 2
        write(axes, middle, y + 0.82, f"rank {rank}", size=13, weight="bold")
        write(axes, middle, y + 0.40, f"batch {replicate * SHARD + shard}")
    copies = [left + copy * (2 * width + 0.35) + width for copy in range(REPLICATE)]
    for copy, x in enumerate(copies):
        write(axes, x, top + 0.28, f"copy {copy} of the model")
    arrow(axes, (copies[0] - width / 2, top + 0.7), (copies[1] + width / 2, top + 0.7))
    write(axes, sum(copies) / 2, top + 0.9, "replicate")
    arrow(axes, (left - 0.2, top - 0.1), (left - 0.2, top - 2 * height + 0.1))
    write(axes, left - 0.45, top - height, "shard", rotation=90)
    for x in copies:
        arrow(axes, (x - width + 0.1, 0.62), (x + width - 0.1, 0.62))
        write(axes, x, 0.38, "tensor")


def draw_weights(axes):
    """Which ranks hold which rows and columns of two matrices and of a vector."""
    left, side, top = 9.3, 1.3, 3.35
    write(axes, left + side / 2, top + 0.28, "weights, and their ranks")
    for layer, how, y, height in [
        ("up", "ColwiseParallel", 1.9, 1.1),
        ("down", "RowwiseParallel", 0.45, 1.1),
        ("norm", "not in the plan", -0.45, 0.5),
    ]:
        write(axes, left + side / 2, y + height + 0.17, f"{layer}: {how}", size=10)
        for where, owner in {part(layer, *each): each for each in COLOURS}.items():
            x, first, width, size = where
            corner = left + side * x, y + height * (1 - first - size)
            colour = COLOURS[owner] if width * size == 1 / 4 else "#eeeeee"
            box = Rectangle(
                corner, side * width, height * size, facecolor=colour, edgecolor=INK, lw=0.6
            )
            axes.add_patch(box)
            held = [str(rank) for rank, _, s, t in ranks() if part(layer, s, t) == where]
            middle = corner[0] + side * width / 2, corner[1] + height * size / 2
            write(axes, *middle, ", ".join(held), size=9)


def arrow(axes, start, end):
    """An arrow from one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK))


def write(axes, x, y, text, size=11, **how):
    """Text around a point."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, **how)


if __name__ == "__main__":
    main()
