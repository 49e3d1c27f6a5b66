"""The user's facade: five lines between a plain loop and any device, strategy and scale."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchweft import process, worker
from torchweft.accumulation import Accumulation, Groups
from torchweft.api import Accelerator, Precision, RankInfo, Run, Strategy
from torchweft.api.batch import mover
from torchweft.callbacks import Callbacks
from torchweft.catalog import Catalog
from torchweft.dry import DryRun
from torchweft.errors import InvalidRequest, Misuse
from torchweft.gathering import gather_data, reduce_data
from torchweft.given import entry_for, kind_of, sort_plugins
from torchweft.handoff import Handoff
from torchweft.manager import Manager
from torchweft.plan import RunPlan
from torchweft.progress import Bars
from torchweft.request import RunRequest
from torchweft.resolve import resolve
from torchweft.seed import Streams, seed_everything, seed_of_rank
from torchweft.setups import Setups, check_can, set_up_module, set_up_optimizer
from torchweft.stopping import Stopping

__all__ = ["Fabric"]

T = TypeVar("T")

#: Attributes of a Fabric that belong to one process.
_LIVE = ("_manager", "_parts", "_live", "_set_up", "_groups", "_dry_run", "_bars", "_stopping")


class _OrOfTheClass:
    """A method that, asked of the class rather than of an object, is a function instead."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._method: Callable[..., Any] = function

    def __call__(self, method: Callable[..., Any]) -> _OrOfTheClass:
        self._method = method
        self.__doc__ = method.__doc__
        return self

    def __get__(self, obj: Any, owner: type) -> Callable[..., Any]:
        return self._function if obj is None else MethodType(self._method, obj)


class Fabric:
    """Runs a plain PyTorch training loop on any device, with any strategy, by name.

    Everything is decided when it is constructed, before any process starts: see ``plan``.

    Args:
        accelerator: name of an accelerator, an ``Accelerator``, or ``"auto"``.
        strategy: name of a strategy, with options (``"ddp:static_graph=true"``), a ``Strategy``,
            or ``"auto"``.
        devices: number of devices per node, indices (``[0, 2]`` or ``"0,2"``), ``"all"`` or -1,
            or ``"auto"``.
        num_nodes: number of nodes; None: one, or what the launcher outside says.
        precision: name of a precision, or None for 32-bit.
        launcher: name of a launcher, a ``Launcher``, or ``"auto"``.
        plugins: live ``Precision`` or ``Launcher`` objects, one of a kind, and modules of hooks
            that are registered for this Fabric alone.
        callbacks: objects whose methods ``call`` calls.
        loggers: objects with ``log_metrics(metrics, step)``.

    Raises:
        TorchweftError: of the kind that fits, when what was asked for cannot be done here.
    """

    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Any = "auto",
        num_nodes: int | None = None,
        precision: Any = None,
        launcher: Any = "auto",
        plugins: Any = None,
        callbacks: Any = None,
        loggers: Any = None,
    ) -> None:
        named = {
            "accelerator": accelerator,
            "strategy": strategy,
            "precision": precision,
            "launcher": launcher,
        }
        self._given, self._hooks = sort_plugins(plugins)
        for kind, value in named.items():
            named[kind] = self._take_object(kind, value)
        request = RunRequest.parse(**named, devices=devices, num_nodes=num_nodes)
        self._manager = self._load_plugins()
        catalog = Catalog(self._manager.declared)
        self._plan = resolve(
            request.with_environment(os.environ, catalog),
            catalog,
            environ=os.environ,
            given={kind: entry_for(kind, value, catalog) for kind, value in self._given.items()},
            objections=self._manager.objections,
        )
        self._parts = worker.Parts.build(self._plan, self._given)
        self._callbacks = Callbacks(_listed(callbacks))
        self._loggers = _listed(loggers)
        self._made_in = os.getpid()
        handoff = Handoff.read(os.environ)
        self._is_dry_run = handoff is not None and handoff.dry_run
        self._seed = 0
        self._streams: Streams | None = None
        self._reset()

    def _reset(self) -> None:
        self._live: worker.Live | None = None
        self._launched = False
        self._plain_backward = False
        self._backward_is_plain = False
        self._dry_run: DryRun | None = None
        self._bars = Bars()
        self._divide_loss_by = 1
        self._groups = Groups()
        self._backward_open = [False]
        self._set_up: Setups | None = None
        self._stopping: Stopping | None = None

    def _take_object(self, kind: str, value: Any) -> Any:
        """Move a live object from its argument to the given ones; names stay."""
        if kind_of(value) is None:
            if kind in self._given and value not in (None, "auto"):
                raise InvalidRequest(
                    f"{kind}={value!r} and a {type(self._given[kind]).__name__} in plugins= were "
                    "both given; leave one of them out"
                )
            return value
        if kind_of(value) != kind:
            raise InvalidRequest(
                f"{kind}= was given {type(value).__name__}(), which is a {kind_of(value)}; pass "
                f"it as {kind_of(value)}="
            )
        if kind in self._given:
            raise InvalidRequest(
                f"{kind}={type(value).__name__}() and a {type(self._given[kind]).__name__} in "
                "plugins= were both given; leave one of them out"
            )
        self._given[kind] = value
        return None

    def _load_plugins(self) -> Manager:
        manager = Manager.from_entry_points(os.environ)
        for module in self._hooks:
            manager.add_module(module)
        return manager

    # -- pickling: a rank in a fresh process builds its own objects from the plan ----------------

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _LIVE}
        state["_hooks"] = [_importable(module) for module in self._hooks]
        state["_streams"] = Streams.capture()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hooks = [importlib.import_module(name) for name in state["_hooks"]]
        self._manager = self._load_plugins()
        self._parts = worker.Parts.build(self._plan, self._given)
        self._reset()

    def picklable_parts(self) -> Iterator[tuple[str, Any]]:
        """What a fresh process must be given, by the words of an error message."""
        for kind, value in self._given.items():
            yield f"the {kind} {type(value).__name__}", value
        for module in self._hooks:
            if sys.modules.get(module.__name__) is not module:
                yield f"the module '{module.__name__}' of plugins=", module
        for callback in self._callbacks:
            yield f"the callback {type(callback).__name__}", callback
        for logger in self._loggers:
            yield f"the logger {type(logger).__name__}", logger
        for name, value in self.__dict__.items():
            if name not in (*_LIVE, "_hooks"):
                yield f"the attribute '{name}' of {type(self).__name__}", value

    # -- processes -------------------------------------------------------------------------------

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Make the processes of the plan.

        Without a function: returns in every rank, and only there; everything above the call ran
        once and is shared by all ranks. With one: calls ``function(fabric, *args, **kwargs)`` in
        every rank and returns what rank 0 returned, tensors on the CPU.

        Raises:
            RankFailed: when a rank of ``launch(function)`` failed; all others were ended.
            Misuse: when called twice, or where the launcher cannot do it, with the way out.
        """
        launcher = self._parts.launcher
        hazard = self._parts.accelerator.fork_hazard
        if function is not None:
            _check_takes_fabric(function, args, kwargs)
            arguments = (self, function, args, kwargs)
            return launcher.launch(self._plan, _in_rank, arguments, fork_hazard=hazard)
        if args or kwargs:
            raise InvalidRequest(
                "fabric.launch() was given arguments without a function to pass them to; write "
                "fabric.launch(function, ...)"
            )
        if self._launched:
            raise Misuse(
                "fabric.launch() was called twice; remove the second call, this process is "
                f"already rank {self.global_rank} of {self.world_size}"
            )
        launcher.launch(self._plan, None, (), fork_hazard=hazard)
        if self._live is None:  # a plan of one process starts by itself where it is needed
            self._join(stay=True)
        self._launched = True
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in vars(cls):
            cls.run = _launched(vars(cls)["run"])  # type: ignore[method-assign]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """For a subclass to override with the training code; calling it launches the processes.

        Returns what rank 0's ``run`` returned, as ``launch(function)`` does.
        """
        raise Misuse(
            f"{type(self).__name__} has no run() of its own; override it in a subclass, or call "
            "fabric.launch(function)"
        )

    def _join(self, *, stay: bool) -> worker.Live:
        parts = self._parts
        self._live = worker.join(self._plan, parts, self._manager, os.environ)
        self._backward_is_plain = (
            type(parts.strategy).backward is Strategy.backward
            and type(parts.precision).scale is Precision.scale
            and not parts.strategy.owns_backward
            and not parts.precision.scales_loss
        )
        if stay:
            worker.stay(self._live, owned=parts.launcher.owns_ranks)
        return self._live

    def _run(self, caller: str) -> Run:
        """The live run; a plan of one process starts by itself."""
        live = self._live
        if live is None:
            if self._plan.topology.world_size > 1:
                how = "fabric.launch() right after Fabric(...)"
                if self._plan.launcher.function == "required":
                    how = "fabric.launch(function) and do this in the function"
                raise Misuse(
                    f"fabric.{caller} came before fabric.launch(), and the plan has "
                    f"{self._plan.topology.world_size} processes ({self._plan.summary()}); call "
                    f"{how}"
                )
            live = self._join(stay=True)
        return live.run

    @property
    def should_stop(self) -> bool:
        """Whether the run was told to stop, so that the loop can save and leave.

        True in all processes at the same step once any of them got ``SIGTERM``, or what a
        scheduler sends before it ends a job (``SIGUSR1``, ``SIGUSR2``), and from then on. Those
        signals end a process until this was asked for the first time. Ask once in every step, in
        every process: the answer is that of the question before, so that nobody waits for it.
        """
        if self._stopping is None:
            self._stopping = Stopping(self._run("should_stop").collectives)
        return self._stopping.ask()

    # -- who and where ---------------------------------------------------------------------------

    @property
    def plan(self) -> RunPlan:
        """What was decided, and why."""
        return self._plan

    @property
    def strategy(self) -> Strategy:
        """The live strategy."""
        return self._parts.strategy

    @property
    def accelerator(self) -> Accelerator:
        """The live accelerator."""
        return self._parts.accelerator

    @property
    def precision(self) -> Precision:
        """The live precision."""
        return self._parts.precision

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._run("device").device

    def _rank(self) -> RankInfo:
        """Before ``launch``, code runs once where ranks are forked, so that it is rank 0's."""
        if self._live is not None:
            return self._live.run.rank
        if self._plan.decisions and self._plan.launcher.outside:
            return self._parts.launcher.rank(os.environ)
        launcher = self._parts.launcher
        if launcher.is_rank(os.environ, self._plan.launcher.name):
            return launcher.rank(os.environ)
        return RankInfo(world_size=self._plan.topology.world_size)

    @property
    def global_rank(self) -> int:
        """Rank of this process among all that run the script."""
        return self._rank().rank

    @property
    def local_rank(self) -> int:
        """Rank of this process among those of its node."""
        return self._rank().local_rank

    @property
    def node_rank(self) -> int:
        """Rank of this process's node."""
        return self._rank().node_rank

    @property
    def world_size(self) -> int:
        """Processes that run the script."""
        return self._rank().world_size

    @property
    def num_replicas(self) -> int:
        """Data-parallel replicas: the number by which to scale a learning rate."""
        return self._run("num_replicas").strategy.shard.replicas

    @property
    def mesh(self) -> Any:
        """The strategy's ``DeviceMesh``, whose dimensions have names: ``fabric.mesh["tensor"]``.

        Raises ``Misuse`` where the strategy has none.
        """
        mesh = self._run("mesh").strategy.mesh
        if mesh is None:
            raise Misuse(
                f"fabric.mesh was read, but strategy '{self._plan.strategy.name}' arranges its "
                "processes in no mesh; fabric.world_size and fabric.global_rank count them"
            )
        return mesh

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks given."""
        return list(self._callbacks)

    @property
    def loggers(self) -> list[Any]:
        """The loggers given."""
        return list(self._loggers)

    @property
    def logger(self) -> Any:
        """The first logger."""
        if not self._loggers:
            raise Misuse("fabric.logger was read, but Fabric(loggers=...) was given none")
        return self._loggers[0]

    # -- setup -----------------------------------------------------------------------------------

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Make a model, its optimizers and a scheduler ready for the strategy.

        A model from ``torch.compile`` is compiled again around what the strategy makes of it.
        Returns what was given, ready, in the same order: the model alone, or a tuple.

        Raises:
            Misuse: when one of them was set up before, or ``launch()`` is missing.
            InvalidRequest: when something else was given.
        """
        setups = self._setups(self._run("setup()"))
        ready = setups.setup(module, optimizers, scheduler, move_to_device, _reapply_compile)
        model = ready[0] if isinstance(ready, tuple) else ready
        self._callbacks.call("on_after_setup", fabric=self, module=model)
        return ready

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> Any:
        """Make a model ready alone; its optimizers follow with ``setup_optimizers``.

        Raises ``Misuse`` where the strategy needs both together.
        """
        setups = self._setups(self._run("setup_module()"))
        model = setups.setup_module(module, move_to_device, _reapply_compile)
        self._callbacks.call("on_after_setup", fabric=self, module=model)
        return model

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers ready whose models were set up before; one alone, or a tuple."""
        wrapped = self._setups(self._run("setup_optimizers()")).setup_optimizers(optimizers)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _setups(self, run: Run) -> Setups:
        if self._set_up is None:
            self._set_up = Setups(run, self._backward_open, self._callbacks)
            self._plain_backward = self._backward_is_plain
        return self._set_up

    def setup_dataloaders(
        self,
        *loaders: Any,
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        duplicates: Literal["keep", "drop", "mask"] = "keep",
        replace_sampler: bool | None = None,
    ) -> Any:
        """Make loaders ready: each replica gets its part, batches come on the device.

        Returns one loader, or a list in the order given. ``use_distributed_sampler=False`` leaves
        the sampling to you; ``move_to_device=False`` leaves batches where they are made.

        ``duplicates``: samples that are repeated so that all replicas get equally many stay
        (``"keep"``), or are left out (``"drop"``: each sample once in all; a process may get a
        smaller last batch, or one batch less), or the loader yields ``(batch, mask)``, the mask
        false for them (``"mask"``: equally many batches everywhere).

        ``replace_sampler`` is the older name of ``use_distributed_sampler``.
        """
        from torchweft.wrappers.dataloader import wrap_loader

        run = self._run("setup_dataloaders()")
        if not loaders:
            raise InvalidRequest("fabric.setup_dataloaders() was called without a loader")
        if replace_sampler is not None:
            use_distributed_sampler = replace_sampler
        strategy = run.strategy
        # What a strategy leaves as it is in the base class costs nothing per batch.
        has_boundary = type(strategy).batch_boundary is not Strategy.batch_boundary
        move: Callable[[Any], Any] = strategy.move
        if type(strategy).move is Strategy.move:
            move = mover(run.device, on_host=run.accelerator.host_memory)
        if self._is_dry_run and self._dry_run is None:
            self._dry_run = DryRun(tells=run.rank.rank == 0)
        wrapped = [
            wrap_loader(
                loader,
                shard=strategy.shard,
                move=move if move_to_device else None,
                boundary=strategy.batch_boundary if has_boundary else None,
                use_distributed_sampler=use_distributed_sampler,
                duplicates=duplicates,
                seed=self._seed,
                around=None if self._dry_run is None else self._dry_run.loader(),
            )
            for loader in loaders
        ]
        return wrapped[0] if len(wrapped) == 1 else wrapped

    # -- the step --------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """In place of ``tensor.backward()``; ``args`` are its own.

        ``model``: which set-up model the loss came from, for strategies that must know.
        """
        if self._plain_backward:
            tensor.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        run = self._run("backward()")
        if self._divide_loss_by != 1:
            tensor = tensor / self._divide_loss_by
        if self._set_up is None and run.rank.world_size > 1:
            raise Misuse(
                "fabric.backward(loss) came before any model was set up, so that every process "
                "would train a model of its own; pass the model to fabric.setup(model, optimizer) "
                "first, or call loss.backward() where that is meant"
            )
        if model is not None:
            model = set_up_module(model, "backward(model=)").prepared
        opened = self._backward_open
        opened[0] = True
        try:
            run.strategy.backward(tensor, model, *args, **kwargs)
        finally:
            opened[0] = False

    def clip_gradients(
        self,
        module: Any,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> Tensor | None:
        """Clip gradients by value (``clip_val``) or by their global norm (``max_norm``).

        Call between ``backward`` and ``step``. Returns the norm before clipping, a scalar tensor
        on the device, or None when clipping by value. ``error_if_nonfinite`` None: an error where
        looking at the norm costs no transfer from a device, and no loss is scaled, so that no
        overflow is to be expected.
        """
        run = self._run("clip_gradients()")
        if (clip_val is None) == (max_norm is None):
            raise InvalidRequest(
                f"fabric.clip_gradients(clip_val={clip_val}, max_norm={max_norm}): give one of "
                "the two, clip_val to clip by value or max_norm to clip by the global norm"
            )
        inside = set_up_optimizer(optimizer, "clip_gradients()").optimizer
        prepared = set_up_module(module, "clip_gradients()").prepared
        if clip_val is not None:
            check_can(run, "clip_by_value", "clip gradients by value (clip_val)")
        else:
            check_can(run, "clip_by_norm", "clip gradients by their norm (max_norm)")
        if error_if_nonfinite is None:
            error_if_nonfinite = run.accelerator.host_memory and not run.precision.scales_loss
        run.precision.unscale(inside)
        return run.strategy.clip(
            prepared,
            inside,
            clip_val=clip_val,
            max_norm=max_norm,
            norm_type=norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )

    def no_backward_sync(self, module: Any, enabled: bool = True) -> AbstractContextManager[Any]:
        """Around forward and backward of all micro-batches of a step but the last."""
        run = self._run("no_backward_sync()")
        prepared = set_up_module(module, "no_backward_sync()").prepared
        if enabled:
            check_can(run, "no_backward_sync", "leave out the synchronisation of gradients")
        return run.strategy.accumulating(prepared, last=not enabled)

    def accumulate(
        self,
        model: Any,
        *,
        steps: int,
        index: int,
        total: int | Sized | None = None,
        scale_loss: bool = False,
    ) -> Accumulation:
        """Around forward and backward of micro-batch ``index`` (from 0) of groups of ``steps``.

        ::

            for i, (input, target) in enumerate(loader):
                with fabric.accumulate(model, steps=4, index=i, total=loader) as acc:
                    fabric.backward(loss_function(model(input), target))
                if acc.should_step:
                    optimizer.step()
                    optimizer.zero_grad()

        Gradients are synchronised in the last of a group alone, where the strategy can leave it
        out. ``model``: one, or a list of several. ``total``: how many micro-batches there are, or
        what has that length; it closes a short last group. ``scale_loss``: ``backward`` divides
        by the number of micro-batches in the group, so that a mean stays a mean.

        Raises ``InvalidRequest`` for numbers that do not fit together, and ``Misuse`` when a group
        is stepped, emptied or left before its end, as far as that can be seen.
        """
        run = self._run("accumulate()")
        models = model if isinstance(model, list | tuple) else [model]
        return self._groups.accumulate(
            run.strategy,
            [set_up_module(each, "accumulate()").prepared for each in models],
            steps=steps,
            index=index,
            total=total,
            dividing=self._dividing_loss if scale_loss else None,
        )

    @contextmanager
    def _dividing_loss(self, number: int) -> Iterator[None]:
        # Outside of the block backward() is not to look for a divisor.
        before = self._plain_backward, self._divide_loss_by
        self._plain_backward, self._divide_loss_by = False, number
        try:
            yield
        finally:
            self._plain_backward, self._divide_loss_by = before

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision's context, for computation outside of a model's ``forward``."""
        return self._run("autocast()").precision.forward_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Around a model's construction: right device and dtype from the start."""
        return self._run("init_module()").strategy.init_context(empty_init)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """The older name of ``init_module()``."""
        return self._run("sharded_model()").strategy.init_context(None)

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Around the creation of tensors: right device and dtype from the start."""
        return self._run("init_tensor()").strategy.tensor_context()

    def to_device(self, value: Any) -> Any:
        """A model, tensor, nested collection or anything with ``.to`` on the device."""
        run = self._run("to_device()")
        return value.to(run.device) if isinstance(value, nn.Module) else run.strategy.move(value)

    # -- between processes -----------------------------------------------------------------------

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print`` on the first process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Return when every process has called it. ``name`` is for the reader."""
        self._run("barrier()").collectives.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The ``obj`` of rank ``src``: a tensor or any object that can be pickled."""
        return self._run("broadcast()").collectives.broadcast(obj, src)

    def all_gather(
        self, data: Any, group: Any = None, sync_grads: bool = False, stack: bool = False
    ) -> Any:
        """Tensors, numbers or arrays of all processes, also in nested collections.

        Each becomes a tensor of shape ``(processes, *shape)``, and keeps its shape where there is
        one process, unless ``stack`` asks for ``(1, *shape)`` there. Shapes must be the same in
        all processes.
        """
        run = self._run("all_gather()")
        return gather_data(run, data, group, sync_grads, stack)

    def all_reduce(self, data: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Tensors, numbers or arrays of all processes reduced, also in nested collections.

        Tensors are changed in place, except where their dtype cannot hold the result, as with the
        mean of integers; what is returned is right either way. ``reduce_op``: ``"mean"`` (also
        ``"avg"``), ``"sum"``, ``"min"``, ``"max"``, ``"product"``, or the one of
        ``torch.distributed.ReduceOp``.
        """
        run = self._run("all_reduce()")
        return reduce_data(run, data, group, reduce_op)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the block before the others; ``local``: the first rank of each node."""
        run = self._run("rank_zero_first()")
        first = (run.rank.local_rank if local else run.rank.rank) == 0
        if not first:
            run.collectives.barrier()
        yield
        # Not in a finally: an exception ends this rank, and the others are not to go on.
        if first:
            run.collectives.barrier()

    @_OrOfTheClass(seed_everything)
    def seed_everything(
        self,
        seed: int | None = None,
        workers: bool | None = None,
        verbose: bool = True,
        *,
        per_rank: bool = False,
    ) -> int:
        """Seed Python's, NumPy's and torch's generators; see ``torchweft.seed_everything``.

        The order of shuffled data in the loaders that are set up afterwards follows ``seed`` too.
        ``per_rank`` gives every rank streams of its own, made from ``seed`` and the rank, so that
        dropout and augmentation differ between ranks; build models before, with equal streams.
        Ranks that share a replica, as in tensor parallelism, share its streams.
        Called on the class it is ``torchweft.seed_everything``.
        """
        chosen = seed_everything(seed, workers, verbose)
        drawn_from = chosen
        if per_rank:
            shard = self._run("seed_everything(per_rank=True)").strategy.shard
            drawn_from = seed_everything(seed_of_rank(chosen, shard.first))
        if self._live is not None:
            self._parts.accelerator.seed(drawn_from)
        self._seed = chosen
        return chosen

    # -- checkpoints -----------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        filter: Mapping[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write models, optimizers and values; call it in every rank.

        A path with a suffix becomes one file, which ``torch.load`` reads. A path without one
        becomes a folder, to which every rank writes its part. Either appears whole or not at all.

        ``state``: by name. ``filter``: by name, ``(key, value) -> bool``, what to keep of that
        part; in a file's case ``value`` is a whole tensor, in a folder's one that may be sharded.

        Raises ``CheckpointError``, with what was there before intact.
        """
        from torchweft.checkpoint import save

        if isinstance(path, Mapping):
            raise InvalidRequest(
                "fabric.save(state, path) is the order of an older API; write "
                "fabric.save(path, state)"
            )
        save(self._run("save()"), Path(path), state, filter)

    def load(
        self,
        path: str | os.PathLike[str],
        state: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Fill models, optimizers and anything with ``load_state_dict`` in place.

        ``path``: a file or a folder, written by any strategy on any number of devices. Returns
        what it holds beyond ``state``; everything, when ``state`` is None. No code from it is run
        unless ``weights_only=False``.

        Raises ``CheckpointError``.
        """
        from torchweft.checkpoint import load

        return load(self._run("load()"), Path(path), state, strict, weights_only)

    def load_raw(
        self,
        path: str | os.PathLike[str],
        obj: Any,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> None:
        """Fill one model or optimizer from a file that holds nothing but its state.

        Or from a folder that ``torch.distributed.checkpoint.save`` wrote of one.
        """
        from torchweft.checkpoint import load_raw

        load_raw(self._run("load_raw()"), Path(path), obj, strict, weights_only)

    # -- looking into a run ----------------------------------------------------------------------

    def breakpoint(self) -> None:
        """Open Python's debugger here on rank 0; call it in every rank.

        The others wait until rank 0 goes on (``continue``, ``next``, …), for as long as the
        strategy lets a collective operation take, 30 minutes unless it was told otherwise.
        """
        run = self._run("breakpoint()")
        if run.rank.rank != 0:
            run.collectives.barrier()
            return
        from torchweft.debugging import HoldingPdb

        HoldingPdb(run.collectives.barrier).set_trace(sys._getframe(1))

    def memory(self) -> list[dict[str, int]]:
        """Bytes in use by rank, of the host and of the device; call it in every rank.

        ``"host"`` and ``"host_peak"`` are the process's resident memory; the other keys are the
        accelerator's.
        """
        from torchweft.debugging import memory_by_rank

        return memory_by_rank(self._run("memory()"))

    def track(
        self, iterable: Iterable[T], description: str = "", total: int | None = None
    ) -> Iterator[T]:
        """Yield the items and show on rank 0 how many there were; see ``docs/logging.md``.

        A bar where stderr is a terminal, now and then a line elsewhere. ``total``: how many there
        will be, where ``len(iterable)`` does not say so.
        """
        return self._bars.track(iterable, description, total, show=self.is_global_zero)

    # -- callbacks and loggers -------------------------------------------------------------------

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method of that name on every callback that has one, in order.

        A method gets those keyword arguments that it names, or all where it has ``**kwargs``.
        ``setup`` calls ``on_after_setup(fabric=, module=)``, and an optimizer that was set up
        ``on_after_optimizer_step(strategy=, optimizer=)``.
        """
        self._callbacks.call(hook_name, *args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Give one number to every logger, on rank 0."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give numbers by name to every logger, on rank 0."""
        if not self.is_global_zero:
            return
        plain = {name: _number(name, value) for name, value in metrics.items()}
        for logger in self._loggers:
            logger.log_metrics(metrics=plain, step=step)


def _in_rank(
    fabric: Fabric,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """What ``launch(function)`` runs in every rank."""
    launched, fabric._launched = fabric._launched, True
    if fabric._live is not None or os.getpid() == fabric._made_in:
        # No process was made: this one goes on afterwards, and leaves the run when it ends.
        try:
            if fabric._live is None:
                fabric._join(stay=True)
            return function(fabric, *args, **kwargs)
        finally:
            fabric._launched = launched
    if fabric._streams is not None:
        fabric._streams.restore()
    live = fabric._join(stay=False)
    try:
        result = function(fabric, *args, **kwargs)
    except BaseException as error:
        failed = process.exit_status(error) != 0  # sys.exit() ends it well
        if failed:
            sys.last_value = error
        live.leave(failed=failed)
        raise
    live.leave(failed=False)
    return result


def _launched(run: Callable[..., Any]) -> Callable[..., Any]:
    """The ``run`` of a subclass, which makes the processes first where there are none yet."""

    @functools.wraps(run)
    def launching(self: Fabric, *args: Any, **kwargs: Any) -> Any:
        if self._launched:
            return run(self, *args, **kwargs)
        return self.launch(_run_of, *args, **kwargs)

    return launching


def _run_of(fabric: Fabric, *args: Any, **kwargs: Any) -> Any:
    """Found by its name in a fresh process, as a method of the user's is not."""
    return fabric.run(*args, **kwargs)


def _check_takes_fabric(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if not callable(function):
        raise InvalidRequest(
            f"fabric.launch({function!r}) was given a {type(function).__name__}; it takes a "
            "function, whose first argument is the Fabric"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable of C has no signature to look at
        return
    if not signature.parameters:
        raise InvalidRequest(
            f"fabric.launch({_name(function)}) calls the function with the Fabric as its first "
            f"argument, and it takes none; write def {_name(function)}(fabric): …"
        )
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        raise InvalidRequest(
            f"fabric.launch() cannot call {_name(function)}{signature} with the Fabric and the "
            f"arguments given behind the function: {error}"
        ) from None


def _importable(module: ModuleType) -> str:
    if sys.modules.get(module.__name__) is not module:
        raise TypeError(f"'{module.__name__}' cannot be imported by that name")
    return module.__name__


def _name(value: Any) -> str:
    """A function's or a class's own name, and of everything else that of its class."""
    return str(getattr(value, "__name__", None) or type(value).__name__)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise InvalidRequest(
            f"the metric '{name}' is a tensor of shape {tuple(value.shape)}, and loggers take "
            "single numbers; reduce it first, for example by .mean()"
        )
    return value.item()
