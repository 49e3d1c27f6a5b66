"""How the processes of a run are arranged by ``fsdp``; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from torchweft.errors import InvalidRequest

__all__ = ["Sizes", "check_reshard", "check_sizes", "sizes_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of each dimension, from the outermost to the innermost.

    Attributes:
        replicate: copies of the model.
        shard: processes between which the parameters of a copy are split.
        tensor: processes that compute a layer together.
    """

    replicate: int
    shard: int
    tensor: int

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions that there are; ``"shard"`` is one of them always."""
        there = {"replicate": self.replicate > 1, "shard": True, "tensor": self.tensor > 1}
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each of ``names``."""
        return tuple(int(getattr(self, name)) for name in self.names)


def sizes_for(
    processes: int, *, replicate: int | None, shard: int | None, tensor: int | None
) -> Sizes:
    """The sizes for so many processes; what was left open takes what is left of them.

    Raises ``InvalidRequest`` where they do not multiply to the number of processes.
    """
    asked = check_sizes(replicate=replicate, shard=shard, tensor=tensor)
    if asked.get("tensor") == 1:
        del asked["tensor"]
    product = 1
    for size in asked.values():
        product *= size
    left, rest = divmod(processes, product)
    # Nothing is left open where both of the data-parallel sizes were given.
    if rest or ("replicate" in asked and "shard" in asked and left != 1):
        raise InvalidRequest(_misfit(processes, asked, product))
    open_size = "replicate" if shard is not None else "shard"
    settled = {"replicate": 1, "shard": 1, "tensor": 1, **asked}
    if open_size not in asked:
        settled[open_size] = left
    return Sizes(**settled)


def check_sizes(**given: int | None) -> dict[str, int]:
    """Those that were given. Raises ``InvalidRequest`` for one below 1."""
    asked = {name: size for name, size in given.items() if size is not None}
    for name, size in asked.items():
        if size < 1:
            raise InvalidRequest(
                f"strategy 'fsdp' was given {name}={size}; it counts {_COUNTED[name]}, from 1"
            )
    return asked


def check_reshard(reshard: bool | int, sizes: Sizes) -> None:
    """Raise ``InvalidRequest`` for a number of processes that a copy cannot be split between."""
    fitting = [n for n in range(2, sizes.shard) if sizes.shard % n == 0]
    if isinstance(reshard, bool) or reshard in fitting:
        return
    numbers = f", {_listed(fitting)}" if fitting else ""
    raise InvalidRequest(
        f"strategy 'fsdp' was given reshard_after_forward={reshard}, and a copy of the model is "
        f"split between {sizes.shard} process{'es' if sizes.shard > 1 else ''}; write true, "
        f"false{numbers}"
    )


_COUNTED = {
    "replicate": "copies of the model",
    "shard": "the processes between which a copy is split",
    "tensor": "the processes that compute a layer together",
}


def _misfit(processes: int, asked: dict[str, int], product: int) -> str:
    said = ", ".join(f"{name}={size}" for name, size in asked.items())
    there = f"{processes} process{'es' if processes > 1 else ''}"
    fitting = [n for n in range(1, processes + 1) if processes % n == 0]
    if len(asked) == 1:
        ((name, size),) = asked.items()
        return (
            f"strategy 'fsdp' was given {said}, and the {there} of the run cannot be divided into "
            f"{size} equal parts; write {name}={_listed(fitting)}"
        )
    both = "replicate" in asked and "shard" in asked
    aim = f"multiply to {processes}" if both else f"multiply to {_listed(fitting)}"
    return (
        f"strategy 'fsdp' was given {said}, which multiply to {product}, and the run has "
        f"{there}; choose sizes that {aim}"
        + (
            ""
            if not both
            else f" (each is one of {_listed(fitting)}), or leave out replicate or shard"
        )
    )


def _listed(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
