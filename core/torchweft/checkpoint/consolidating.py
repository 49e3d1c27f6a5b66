"""A checkpoint in another form: a folder as one file, a model's weights alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchweft.checkpoint.describing import is_model
from torchweft.checkpoint.file import beside, reason, write
from torchweft.checkpoint.layouts import laid_out_in
from torchweft.checkpoint.nesting import key_list
from torchweft.checkpoint.opening import open_checkpoint
from torchweft.checkpoint.reading import Folder
from torchweft.checkpoint.restoring import Source
from torchweft.checkpoint.state import RESERVED
from torchweft.errors import CheckpointError, InvalidRequest, NotAvailable, did_you_mean

__all__ = ["WEIGHTS", "consolidate"]

#: The suffix of a file of weights.
WEIGHTS = ".safetensors"


def consolidate(
    path: str | os.PathLike[str], output: str | os.PathLike[str], key: str | None = None
) -> list[str]:
    """Write a checkpoint as one file, or, by the suffix, its weights alone; returns notes.

    All of what is written is in memory meanwhile. ``key`` is that of the model in the checkpoint.

    Raises:
        CheckpointError: when it cannot be read or written.
        InvalidRequest: when there is nothing to do, or no such model.
        NotAvailable: when the package for weights is missing.
    """
    if os.fspath(output).endswith(WEIGHTS):
        _need_safetensors()
        content, source = open_checkpoint(path, mapped=True)
        _check_by_name(path, content)
        return _write_weights(output, _model(path, content, source, key))
    if key is not None:
        raise InvalidRequest(
            f"--key chooses the model whose weights are written; give --output a name that ends in "
            f"'{WEIGHTS}', not '{os.fspath(output)}'"
        )
    content, source = open_checkpoint(path)
    if not isinstance(source, Folder):
        raise InvalidRequest(
            f"'{os.fspath(path)}' is one file already; to write its model's weights alone, give "
            f"--output a name that ends in '{WEIGHTS}'"
        )
    _check_by_name(path, content)
    write(output, source.whole(content))
    return []


def _check_by_name(path: str | os.PathLike[str], content: Any) -> None:
    """Raise ``CheckpointError`` for what one process alone cannot read."""
    for found in laid_out_in(content):
        raise CheckpointError(
            f"'{os.fspath(path)}' holds a model in the layout '{found.layout}' of strategy "
            f"'{found.strategy}', whose own processes alone read it; {found.way_out}"
        )


def _need_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise NotAvailable(
            "the package safetensors, which writes files of that suffix, is not installed; try: "
            'pip install "torchweft[safetensors]"'
        )


def _model(
    path: str | os.PathLike[str], content: Any, source: Source, key: str | None
) -> Mapping[str, Any]:
    """The state of one model, whole."""
    if key is None and is_model(content):
        return _whole(source, content)
    models = [each for each in content if each != RESERVED and is_model(content[each])]
    if not models:
        raise InvalidRequest(
            f"'{os.fspath(path)}' holds no model; it holds {key_list(content, RESERVED)}"
        )
    if key is None:
        key = "model" if "model" in models else str(models[0]) if len(models) == 1 else None
    if key not in models:
        asked = f"no model '{key}'" if key is not None else "several models"
        near = did_you_mean(key, map(str, models)) if key else ""
        raise InvalidRequest(
            f"'{os.fspath(path)}' holds {asked}{near or ';'} choose one by --key: "
            f"{', '.join(map(repr, models))}"
        )
    return _whole(source, content[key])


def _whole(source: Source, value: Any) -> Mapping[str, Any]:
    state: Mapping[str, Any] = source.unused(value)
    return state


def _write_weights(output: str | os.PathLike[str], state: Mapping[str, Any]) -> list[str]:
    from safetensors.torch import save_file

    target = os.path.realpath(output)
    tensors, ties = _untied(state)
    left = [name for name, value in state.items() if not isinstance(value, Tensor)]
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with beside(target) as file:
            # By the ties, safetensors.torch.load_model knows which names are not missing.
            save_file(tensors, file.name, metadata={"format": "pt", **ties})
            # It may have made another file of that name, which nobody else could read.
            os.chmod(file.name, os.fstat(file.fileno()).st_mode & 0o777)
            with open(file.name, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file.name, target)
    except Exception as error:
        raise CheckpointError(
            f"cannot write '{os.path.abspath(output)}': {reason(error)}"
        ) from error
    notes = [f"'{name}' is tied with '{kept}', and stored once" for name, kept in ties.items()]
    return notes + [f"'{name}' is not a tensor, and left out" for name in left]


def _untied(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and by name those left out for another name."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    storages = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        storage = value.untyped_storage().data_ptr()
        where = (storage, value.storage_offset(), value.dtype, value.shape, value.stride())
        if value.numel() and first.setdefault(where, name) != name:
            ties[name] = first[where]
            continue
        # A view of another tensor's memory becomes one of its own.
        tensors[name] = (
            value.clone(memory_format=torch.contiguous_format)
            if (storage in storages or not value.is_contiguous())
            else value
        )
        storages.add(storage)
    return tensors, ties
