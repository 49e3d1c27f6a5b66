"""What may be asked of strategy ``deepspeed``: options and a configuration, without torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchweft.errors import InvalidRequest, did_you_mean

__all__ = [
    "OWNED",
    "check_drive",
    "merged",
    "objections",
    "of_one_model",
    "read_config",
    "stage_of",
]

DEFAULT_STAGE = 2

#: Keys of DeepSpeed's configuration that follow from the script, and what says the same there.
OWNED: Mapping[str, str] = {
    "train_batch_size": "the batch size of the loader that fabric.setup_dataloaders() is given",
    "train_micro_batch_size_per_gpu": "the batch size of the loader that "
    "fabric.setup_dataloaders() is given",
    "gradient_accumulation_steps": "fabric.accumulate(model, steps=…)",
    "managed_gradient_accumulation": "fabric.accumulate(model, steps=…)",
    "gradient_clipping": "fabric.clip_gradients(model, optimizer, max_norm=…)",
    "fp16": "precision='16-mixed' or '16-true', which takes the options of that block",
    "bf16": "precision='bf16-mixed' or 'bf16-true', which takes the options of that block",
    "bfloat16": "precision='bf16-mixed' or 'bf16-true', which takes the options of that block",
    "amp": "precision='16-mixed' or 'bf16-mixed'",
    "optimizer": "the optimizer that fabric.setup(model, optimizer) is given",
    "scheduler": "the scheduler that fabric.setup(model, optimizer, scheduler=…) is given",
    "checkpoint": "fabric.save(path, …) and fabric.load(path, …), which write and read the files",
}

#: Options of the strategy that are keys of ``zero_optimization`` under the same name.
ZERO_OPTIONS = (
    "stage",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "allgather_partitions",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
)

#: Options of the strategy that are keys of ``activation_checkpointing`` under the same name.
ACTIVATION_OPTIONS = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "synchronize_checkpoint_boundary",
    "number_checkpoints",
)

#: Options of the strategy that are keys of the configuration itself.
TOP_OPTIONS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")

#: By option, where in ``zero_optimization`` it goes.
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_parameters": "offload_param"}
_DEVICES = ("none", "cpu", "nvme")

#: Of the library by which DeepSpeed reads and writes a drive.
_AIO = "libaio.h"


def objections(options: Mapping[str, Any], device: str = "") -> list[str]:
    """What is wrong with options of the strategy: one sentence each.

    ``device``: torch's word for the kind that is used, once it is known.
    """
    try:
        config = merged(options)
    except InvalidRequest as error:
        return [str(error)]
    activations = config.get("activation_checkpointing", {})
    return [
        *_about_zero(config["zero_optimization"]),
        *_about_activations(activations, device),
    ]


def merged(options: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration as the options and their ``config`` say, without what is owned.

    Raises ``InvalidRequest`` where both say something, or ``config`` what is not its to say.
    """
    config = read_config(options.get("config"))
    for key, instead in OWNED.items():
        if config.get(key) not in (None, "auto"):
            raise InvalidRequest(
                f"strategy 'deepspeed' was given config= with '{key}': {config[key]!r}, and that "
                f"follows from {instead}; leave '{key}' out of the configuration"
            )
        config.pop(key, None)
    zero = _block(config, "zero_optimization")
    for option in ZERO_OPTIONS:
        _settle(zero, option, option, options, "zero_optimization.")
    for option, key in _OFFLOADS.items():
        _settle_offload(zero, option, key, options)
    zero.setdefault("stage", DEFAULT_STAGE)
    config["zero_optimization"] = zero
    activations = _block(config, "activation_checkpointing")
    for option in ACTIVATION_OPTIONS:
        _settle(activations, option, option, options, "activation_checkpointing.")
    if activations:
        config["activation_checkpointing"] = activations
    for option in TOP_OPTIONS:
        _settle(config, option, option, options, "")
    # Which optimizers DeepSpeed has tested is no reason to refuse the others.
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def read_config(config: Any) -> dict[str, Any]:
    """A copy of a configuration given as a dict, or as the path of a JSON file.

    Raises ``InvalidRequest`` for a file that is not there, is not JSON or holds no object.
    """
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | os.PathLike):
        raise InvalidRequest(
            f"strategy 'deepspeed' was given config={config!r}; it takes a dict or the path of a "
            "JSON file"
        )
    path = os.path.abspath(config)
    try:
        with open(path, encoding="utf-8") as file:
            read = json.load(file)
    except OSError as error:
        raise InvalidRequest(
            f"strategy 'deepspeed' was given config='{os.fspath(config)}', and '{path}' cannot be "
            f"read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise InvalidRequest(
            f"strategy 'deepspeed' was given config='{os.fspath(config)}', and '{path}' is not "
            f"JSON: {error}"
        ) from None
    if not isinstance(read, dict):
        raise InvalidRequest(
            f"strategy 'deepspeed' was given config='{os.fspath(config)}', and '{path}' holds a "
            f"{type(read).__name__} where an object belongs"
        )
    return read


def check_drive(config: Mapping[str, Any]) -> None:
    """Raise ``InvalidRequest`` where a file cannot be made in a folder to offload to.

    What permissions say beforehand is not all: file systems may be full, or read-only, or none.
    """
    for key in _OFFLOADS.values():
        block = config["zero_optimization"].get(key, {})
        if block.get("device") != "nvme":
            continue
        path = str(block["nvme_path"])
        try:
            os.makedirs(path, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
                file.flush()
        except OSError as error:
            raise InvalidRequest(
                f"strategy 'deepspeed' was given nvme_path='{path}', and no file can be made "
                f"there: {error.strerror}; name a folder that this user may write"
            ) from error


def stage_of(config: Mapping[str, Any]) -> int:
    """The stage of a merged configuration."""
    return int(config["zero_optimization"]["stage"])


def of_one_model(config: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A merged configuration whose folders of a drive are those of one model alone.

    DeepSpeed empties the folder of parameters for each model, with those of the ones before.
    """
    zero = dict(config["zero_optimization"])
    for key in _OFFLOADS.values():
        path = zero.get(key, {}).get("nvme_path")
        if path is not None:
            zero[key] = {**zero[key], "nvme_path": os.path.join(path, f"model{number}")}
    return {**config, "zero_optimization": zero}


def _block(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    block = config.get(name, {})
    if not isinstance(block, Mapping):
        raise InvalidRequest(
            f"strategy 'deepspeed' was given config= with '{name}': {block!r}; an object belongs "
            "there"
        )
    # DeepSpeed has its own value for what others leave to a library to fill in.
    return {key: value for key, value in block.items() if value != "auto"}


def _settle(
    block: dict[str, Any], key: str, option: str, options: Mapping[str, Any], where: str
) -> None:
    """Put an option into its place, unless the configuration says something else there."""
    value = options.get(option)
    if value is None:
        return
    if block.setdefault(key, value) != value:
        raise InvalidRequest(
            f"strategy 'deepspeed' was given {option}={value!r} and config= with "
            f"'{where}{key}': {block[key]!r}; leave one of them out"
        )


def _settle_offload(
    zero: dict[str, Any], option: str, key: str, options: Mapping[str, Any]
) -> None:
    device, path = options.get(option), options.get("nvme_path")
    block = _block(zero, key)
    _settle(block, "device", option, {option: device}, f"zero_optimization.{key}.")
    if block.get("device") == "nvme":
        _settle(block, "nvme_path", "nvme_path", options, f"zero_optimization.{key}.")
    if block:
        zero[key] = block
    if path is not None and "nvme" not in (
        options.get("offload_optimizer"),
        options.get("offload_parameters"),
        block.get("device"),
    ):
        raise InvalidRequest(
            f"strategy 'deepspeed' was given nvme_path='{path}', and nothing is offloaded there; "
            "write offload_optimizer='nvme' beside it, or leave it out"
        )


def _about_activations(block: Mapping[str, Any], device: str) -> list[str]:
    found = []
    # DeepSpeed takes what it knows of this block, and passes over the rest.
    known = sorted([*ACTIVATION_OPTIONS, "profile"])
    for key in block:
        if key not in known:
            near = did_you_mean(key, known) or ";"
            found.append(
                f"strategy 'deepspeed' was given config= with 'activation_checkpointing.{key}', "
                f"which DeepSpeed does not know{near} it knows {', '.join(known)}"
            )
    found += [
        f"strategy 'deepspeed' was asked for {option}, by which DeepSpeed divides activations "
        "between the processes that have one model together; here every process has a model, so "
        "that it would save nothing: leave it out"
        for option in ("partition_activations", "contiguous_memory_optimization")
        if block.get(option)
    ]
    if block.get("cpu_checkpointing") and device == "cpu":
        found.append(
            "strategy 'deepspeed' was asked for cpu_checkpointing, which moves activations to the "
            "memory of the host, and on accelerator 'cpu' they are there; leave it out"
        )
    return found


def _about_zero(zero: Mapping[str, Any]) -> list[str]:
    found = []
    stage = zero["stage"]
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        return [f"strategy 'deepspeed' has the stages 0, 1, 2 and 3, and stage={stage!r} was asked"]
    for option, key in _OFFLOADS.items():
        device = zero.get(key, {}).get("device", "none")
        if device not in _DEVICES:
            found.append(
                f"strategy 'deepspeed' takes {option} as 'none', 'cpu' or 'nvme', not {device!r}"
            )
        elif device != "none":
            found += _about_offload(option, device, zero[key], stage)
    # One folder is the same for both.
    return list(dict.fromkeys(found))


def _about_offload(option: str, device: str, block: Mapping[str, Any], stage: int) -> list[str]:
    found = []
    if option == "offload_parameters" and stage != 3:
        found.append(
            f"strategy 'deepspeed' was asked for offload_parameters='{device}' at stage {stage}, "
            "where every process needs all parameters; write stage=3 with it"
        )
    if option == "offload_optimizer" and stage == 0:
        found.append(
            f"strategy 'deepspeed' was asked for offload_optimizer='{device}' at stage 0, which "
            "is plain data parallelism; write stage=1, 2 or 3 with it"
        )
    if device != "nvme":
        return found
    if option == "offload_optimizer" and stage in (1, 2):
        found.append(
            f"strategy 'deepspeed' was asked for offload_optimizer='nvme' at stage {stage}; "
            "write stage=3 with it, or offload_optimizer='cpu'"
        )
    path = block.get("nvme_path")
    if path is None:
        found.append(
            f"strategy 'deepspeed' was asked for {option}='nvme', and no folder of the drive was "
            "named; write nvme_path='/the/folder' with it"
        )
    elif (why := _unwritable(str(path))) is not None:
        found.append(
            f"strategy 'deepspeed' was given nvme_path='{path}', {why}; name a folder that this "
            "user may write"
        )
    if not _has_aio():
        found.append(
            f"strategy 'deepspeed' was asked for {option}='nvme', for which DeepSpeed compiles an "
            f"extension with libaio, whose header {_AIO} is not here; install it (apt install "
            "libaio-dev), or write 'cpu' in place of 'nvme'"
        )
    return found


def _has_aio() -> bool:
    """Whether DeepSpeed's extension for a drive can be compiled, or came with DeepSpeed."""
    if any(os.path.exists(os.path.join(each, _AIO)) for each in _include_folders()):
        return True
    package = importlib.util.find_spec("deepspeed")
    folders = [] if package is None else package.submodule_search_locations or []
    return any(any(Path(each, "ops", "aio").glob("async_io_op*.so")) for each in folders)


def _include_folders() -> list[str]:
    """Where a compiler looks for a header."""
    named = [os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")]
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    given = [flag.removeprefix("-I") for flag in flags if flag.startswith("-I")]
    usual = [os.path.join(root, "include") for root in ("/usr", "/usr/local", sys.prefix)]
    return [*os.pathsep.join(named).split(os.pathsep), *given, *usual]


def _unwritable(path: str) -> str | None:
    """Why nothing can be written below ``path``, which may have to be made first."""
    above = os.path.abspath(path)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return f"and '{above}' is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"and '{above}' cannot be written"
    return None
