"""DeepSpeed itself: imported when it is chosen, for the kind of device that was chosen."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch.distributed as dist

from torchweft.errors import IncompatiblePlan, NotAvailable

__all__ = ["join", "load", "made_for"]

_DEVICE = "DS_ACCELERATOR"


def load(device: str) -> Any:
    """The package ``deepspeed``, working on a kind of device in torch's word.

    DeepSpeed reads ``DS_ACCELERATOR`` once, when it is imported, and otherwise looks for a device
    by itself. Raises ``IncompatiblePlan`` where it was set up for another one before.
    """
    asked = os.environ.setdefault(_DEVICE, device)
    if asked != device:
        raise IncompatiblePlan(
            f"strategy 'deepspeed' is to work on '{device}', and {_DEVICE}='{asked}' is set in the "
            f"environment; unset {_DEVICE}, which follows from the accelerator"
        )
    try:
        import deepspeed
    except ImportError as error:
        raise NotAvailable(
            f"strategy 'deepspeed' (torchweft-deepspeed) cannot import deepspeed: {error}"
        ) from error
    _find_ninja()
    found = made_for()
    if found != device:
        raise IncompatiblePlan(
            f"strategy 'deepspeed' is to work on '{device}', and DeepSpeed was imported for "
            f"'{found}' before; remove the script's own import of deepspeed, or move it behind "
            "fabric.launch()"
        )
    return deepspeed


def _find_ninja() -> None:
    """Have ninja found where its package is, also in an environment that was not activated.

    torch looks for the program alone.
    """
    if shutil.which("ninja") is not None:
        return
    with suppress(ImportError):
        import ninja

        path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{path}"


def made_for() -> str:
    """The kind of device that DeepSpeed works on, in torch's word."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().device_name())


def join(local_rank: int, verbose: bool) -> None:
    """Have DeepSpeed use the process group that there is.

    What it says is kept to what a user has to know, unless ``verbose``. DeepSpeed reads
    ``LOCAL_RANK`` from the environment, which is there where a launcher made several processes, and
    alone is not.
    """
    from deepspeed.utils import logger

    import deepspeed

    level = logging.INFO if verbose else logging.WARNING
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    with ExitStack() as stack:
        if not verbose:
            logger.addFilter(_is_news)
            warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
        stack.enter_context(_without_shared_memory(deepspeed))
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=verbose)


@contextmanager
def _without_shared_memory(deepspeed: Any) -> Iterator[None]:
    """Leave out an extension for the host that reduces in inference alone.

    Its compilation takes a minute, and a rank that is ended meanwhile leaves a lock behind, at
    which every later run would wait.
    """
    compatible, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    before = compatible.get(name)
    compatible[name] = False
    try:
        yield
    finally:
        compatible[name] = before


def _is_news(record: logging.LogRecord) -> bool:
    # What is done on purpose: to take optimizers that DeepSpeed has no tests of, and to have
    # autocast around its engine, which leaves it, and inside again.
    known = ("ZeRO with an untested optimizer", "torch.autocast is enabled outside DeepSpeed")
    return not any(words in record.getMessage() for words in known)


#: What DeepSpeed calls in torch by names that are about to change.
_RENAMED = r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated"
