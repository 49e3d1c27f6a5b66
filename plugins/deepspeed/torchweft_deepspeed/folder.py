"""DeepSpeed's own files of a model and its optimizer: each process writes and reads its part."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from torchweft.api import FolderLayout, Foreign
from torchweft.api.state import parameter_names
from torchweft.errors import CheckpointError, listed
from torchweft_deepspeed.engine import Engine
from torchweft_deepspeed.engines import Engines
from torchweft_deepspeed.sending import send

__all__ = ["Layout"]

_LATEST = "latest"

#: How a step is computed rather than what; the running optimizer keeps its own.
_OWN_OPTIONS = ("foreach", "fused", "capturable", "differentiable")

#: Options of ZeRO by which DeepSpeed arranges what it divides.
_ARRANGING = ("round_robin_gradients", "zero_hpz_partition_size", "parameter_alignment")


class Layout(FolderLayout):
    """What ``engine.save_checkpoint`` writes, read without running code that is in it.

    Nothing is gathered: of stages 1 to 3, where there is something to gather.
    """

    name = "deepspeed"

    def __init__(self, engines: Engines, original: Callable[[nn.Module], nn.Module]) -> None:
        self._engines = engines
        self._original = original

    def takes(self, module: nn.Module, optimizer: Optimizer) -> bool:
        """A model in an engine of stage 1, 2 or 3, with the optimizer that is in it.

        Of what is on a drive DeepSpeed's own files have a part, under names that change.
        """
        engine = self._engines.get(module)
        if engine is None or engine.stage == 0 or engine.optimizer is not optimizer:
            return False
        live = engine.live
        return not (live.zero_nvme_offload_optimizer() or _parameters_on_a_drive(live))

    def save(self, folder: str, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """By the engine, with the script beside that makes plain weights of it."""
        engine = self._engine(module)
        tag, files = f"global_step{engine.live.global_steps}", _Files()
        # A scheduler may have changed them behind the last step.
        engine.tell_options()
        # What rank 0 alone writes comes when nobody waits for it any more.
        own = {"checkpoint_engine": files, "_copy_recovery_script": lambda path: None}
        with _instead(engine.live, own):
            engine.live.save_checkpoint(folder, tag=tag, save_latest=False)
        files.check()
        if dist.get_rank() == 0:
            _write_beside(folder, tag)
        return self._facts(engine)

    def find(self, path: str) -> Foreign | None:
        """A folder of ``engine.save_checkpoint``, or that of one step in it."""
        if os.path.isfile(os.path.join(path, _LATEST)) or _states(path):
            return _foreign(path)
        above = os.path.dirname(path)
        steps = [os.path.join(path, name) for name in sorted(os.listdir(path))]
        inside = [each for each in steps if os.path.isfile(os.path.join(each, _LATEST))]
        inside = inside or [each for each in steps if _states(each)]
        if inside:
            raise CheckpointError(
                f"'{path}' is a folder with DeepSpeed's checkpoints in it, not one itself; it "
                f"holds {listed([repr(each) for each in inside])}"
            )
        if os.path.isfile(os.path.join(above, _LATEST)) and _states(
            os.path.join(above, _tag(above))
        ):
            raise CheckpointError(
                f"'{path}' is in a folder of DeepSpeed's checkpoints, and is none; load '{above}'"
            )
        return None

    def check(
        self, facts: Mapping[str, Any], module: nn.Module, optimizer: Optimizer | None
    ) -> None:
        """The same model and optimizer, divided in the same way."""
        here = self._facts(self._engine(module))
        # DeepSpeed itself tells less.
        complete = "optimizer" in facts
        _check_model(facts["parameters"], here["parameters"], complete)
        facts = {**here, **facts}
        differing = [
            f"{what} {facts[key]} there and {here[key]} here"
            for key, what in (
                ("processes", "the number of processes is"),
                ("stage", "the stage is"),
                ("precision", "the precision's block is"),
                ("options", "the options that arrange it are"),
            )
            if facts[key] != here[key]
        ]
        if not differing and facts["divided"] != here["divided"]:
            differing = ["the groups of parameters are not the same"]
        if optimizer is not None and facts["optimizer"] != here["optimizer"]:
            there = facts["optimizer"]
            differing.append(f"the optimizer is {there} there and {here['optimizer']} here")
        if differing:
            there = "1 device" if facts["processes"] == 1 else f"{facts['processes']} devices"
            raise CheckpointError(
                f"DeepSpeed's files go on only as they were written: {'; '.join(differing)}; load "
                f"them with strategy '{facts['strategy']}' on {there} and save to a path with a "
                "suffix, such as 'x.ckpt', which every stage reads on any number of devices"
            )

    def load(self, folder: str, module: nn.Module, optimizer: Optimizer | None) -> None:
        """By the engine, once every process has its files open."""
        engine = self._engine(module)
        live, files = engine.live, _Files()
        with _told_to_all():
            folder, tag = _step(folder)
            names = [live._get_ckpt_name(folder, tag)]
            files.read(names[0], mapped=True)
            # What becomes the optimizer's state is not to hang on a file.
            files.read(live._get_zero_ckpt_name(folder, tag), mapped=False)
        # Which it looks for by a pattern, in which a path's own characters would count.
        own = {"checkpoint_engine": files, "_get_all_ckpt_names": lambda *_: names}
        with _instead(live, own), _optimizer_kept(engine, optimizer is None):
            live.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
        engine.holding.link()
        engine.forget()
        if optimizer is not None:
            engine.hear_options(but=_OWN_OPTIONS)
        send(self._original(module).buffers())

    def _engine(self, module: nn.Module) -> Engine:
        engine = self._engines.get(module)
        if engine is None or engine.optimizer is None or engine.stage == 0:
            raise CheckpointError(
                "DeepSpeed's files are read into a model that was set up with its optimizer, at "
                "stage 1, 2 or 3; this one was not"
            )
        return engine

    def _facts(self, engine: Engine) -> dict[str, Any]:
        module, live = engine.module, engine.live
        names = parameter_names([module])
        shapes = {names[id(p)]: list(getattr(p, "ds_shape", p.shape)) for p in module.parameters()}
        low = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        zero = live._config.zero_config
        return {
            "strategy": f"deepspeed_stage_{engine.stage}",
            "processes": dist.get_world_size(),
            "stage": engine.stage,
            "precision": low.get(live.get_data_types()[0], "none"),
            "optimizer": type(engine.optimizer).__name__,
            "options": {name: getattr(zero, name, None) for name in _ARRANGING},
            "divided": [[names[id(p)] for p in held] for _, held in engine.holding.held],
            "parameters": shapes,
        }


def _parameters_on_a_drive(live: Any) -> bool:
    offload = live._config.zero_config.offload_param
    return offload is not None and offload.device == "nvme"


def _check_model(there: Mapping[str, Any], here: Mapping[str, Any], complete: bool) -> None:
    """The words are those of a checkpoint of one file."""
    unlike = [
        f"'{name}' is {tuple(there[name])} in the checkpoint and {tuple(shape)} in the model"
        for name, shape in here.items()
        if name in there and list(there[name]) != list(shape)
    ]
    missing = [repr(name) for name in here if name not in there and complete]
    unexpected = [repr(name) for name in there if name not in here]
    unlike += [f"the checkpoint has no {listed(missing)}"] if missing else []
    unlike += [f"the model has no {listed(unexpected)}"] if unexpected else []
    if unlike:
        raise CheckpointError(f"the checkpoint is of another model: {', '.join(unlike)}")


def _write_beside(folder: str, tag: str) -> None:
    from deepspeed.utils import zero_to_fp32

    shutil.copy(zero_to_fp32.__file__, folder)
    with open(os.path.join(folder, _LATEST), "x", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())


def _step(folder: str) -> tuple[str, str]:
    """A folder as DeepSpeed has it, and the name of the step in it that is meant."""
    if os.path.isfile(os.path.join(folder, _LATEST)):
        return folder, _tag(folder)
    return os.path.split(folder)


def _tag(folder: str) -> str:
    with open(os.path.join(folder, _LATEST), encoding="utf-8") as file:
        tag = file.read().strip()
    if os.path.basename(tag) != tag:
        raise CheckpointError(
            f"'{os.path.join(folder, _LATEST)}' names '{tag}', which is elsewhere"
        )
    return tag


# -- what DeepSpeed wrote by itself ----------------------------------------------------------------

#: What ``engine.save_checkpoint`` puts beside the ``client_state`` of a script.
_ITS_OWN = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("checkpoint_parallel_dimensions", "universal_checkpoint_info", "ds_config", "ds_version"),
)


def _states(path: str) -> str:
    """The file of one step that describes the model; empty where there is none."""
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    return ""


def _foreign(path: str) -> Foreign:
    folder, tag = _step(path)
    states = _states(os.path.join(folder, tag))
    if not states:
        raise CheckpointError(
            f"'{path}' is half a checkpoint of DeepSpeed: its file '{_LATEST}' names the folder "
            f"'{tag}', and there are no states of a model; copy it again as a whole"
        )
    found = _read(states, mapped=True)
    config = found.get("ds_config") or {}
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    if stage == 0 or found.get("mp_world_size", 1) != 1 or found.get("param_shapes") is None:
        raise CheckpointError(
            f"'{path}' was written by DeepSpeed at stage {stage}, on "
            f"{found.get('mp_world_size', 1)} devices per model; read are those of stages 1, 2 and "
            "3 without model parallelism. The model's state is under 'module' in its file "
            f"'{states}', which torch.load reads"
        )
    shapes = found["param_shapes"]
    block = next((b for b in ("bf16", "fp16") if (config.get(b) or {}).get("enabled")), "none")
    return Foreign(
        processes=found["dp_world_size"],
        facts={
            "strategy": f"deepspeed_stage_{stage}",
            "processes": found["dp_world_size"],
            "stage": stage,
            "precision": block,
            "divided": [list(group) for group in shapes],
            "parameters": {n: list(shape) for group in shapes for n, shape in group.items()},
        },
        rest={key: value for key, value in found.items() if key not in _ITS_OWN},
    )


@contextmanager
def _instead(live: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Parts of DeepSpeed's engine, replaced for a while."""
    before = {name: live.__dict__[name] for name in attributes if name in live.__dict__}
    for name, value in attributes.items():
        setattr(live, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(live, name, before[name])
            else:
                delattr(live, name)


@contextmanager
def _optimizer_kept(engine: Engine, keep: bool) -> Iterator[None]:
    """Leave the optimizer and the loss scale as they are, where the model alone is loaded.

    DeepSpeed's own way to do that gathers the whole model in every process at stage 3.
    """
    inner, scaling = engine.live.basic_optimizer, engine.scaling()
    state, groups = inner.state, [dict(group) for group in inner.param_groups]
    yield
    if keep:
        inner.state = state
        for group, before in zip(inner.param_groups, groups, strict=True):
            group.update((key, value) for key, value in before.items() if key != "params")
        engine.scale_as(scaling)


@contextmanager
def _told_to_all() -> Iterator[None]:
    """Raise in every process what failed in one, so that no other waits for it."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else _said(failure))
    for rank, words in enumerate(told):
        if words is not None:
            raise CheckpointError(f"rank {rank}: {words}") from failure


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"'{error.filename}': {error.strerror}"
    return str(error) if isinstance(error, CheckpointError) else repr(error)


# -- files -----------------------------------------------------------------------------------------


class _Files:
    """In the place of DeepSpeed's engine for files: safe to read, and failures come last.

    An error in the middle of DeepSpeed's own steps would leave the other processes waiting.
    """

    def __init__(self) -> None:
        self._failure: Exception | None = None
        self._content: dict[str, Any] = {}

    # What DeepSpeed calls.

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._try(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        self._try(lambda: _write(path, state_dict))

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._content[path]

    # What the layout calls.

    def read(self, path: str, mapped: bool) -> None:
        """Have a file ready. Raises ``CheckpointError`` for what is not safe to read."""
        self._content[path] = _read(path, mapped)

    def check(self) -> None:
        """Raise what failed."""
        if self._failure is not None:
            raise self._failure

    def _try(self, function: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                function()
            except Exception as error:
                self._failure = error


def _write(path: str, content: Any) -> None:
    with open(path, "xb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    _read(path, mapped=True)


def _read(path: str, mapped: bool) -> Any:
    from pickle import UnpicklingError

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            # DeepSpeed's own form of a file cannot be mapped.
            mapped = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        words = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(
            f"'{path}' holds what is not safe to load, or is damaged: {words or error}"
        ) from error
