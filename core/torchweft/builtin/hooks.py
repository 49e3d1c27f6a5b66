"""What comes with the core: one process on CPU or MPS, precisions, launchers."""

from __future__ import annotations

from torchweft.hookspecs import hookimpl
from torchweft.specs import AcceleratorSpec, LauncherSpec, PrecisionSpec, StrategySpec

_LAUNCHERS = "torchweft.builtin.launchers"


@hookimpl
def torchweft_accelerators() -> list[AcceleratorSpec]:
    """The processor, and Apple's GPU."""
    return [
        AcceleratorSpec(
            name="cpu",
            target="torchweft.builtin.cpu:CPU",
            summary="the processor; devices=N means N processes",
            device="cpu",
            priority=0,
            selectable=False,
        ),
        AcceleratorSpec(
            name="mps",
            target="torchweft.builtin.mps:MPS",
            summary="the GPU of an Apple computer",
            device="mps",
            aliases=("gpu",),
            priority=50,
            probe="torchweft.builtin.probe:mps",
            selectable=False,
        ),
    ]


@hookimpl
def torchweft_strategies() -> list[StrategySpec]:
    """One process on one device."""
    return [
        StrategySpec(
            name="single_device",
            target="torchweft.builtin.single_device:SingleDevice",
            summary="one process on one device",
            priority=100,
            processes="one",
        )
    ]


@hookimpl
def torchweft_precisions() -> list[PrecisionSpec]:
    """Number formats that need nothing but torch."""
    where = "torchweft.builtin.precisions"
    return [
        PrecisionSpec(
            name="32-true",
            target=f"{where}:Full",
            aliases=("32",),
            summary="parameters and computation in 32-bit",
            priority=100,
        ),
        PrecisionSpec(
            name="64-true",
            target=f"{where}:Double",
            aliases=("64",),
            summary="parameters and computation in 64-bit",
            devices=("cpu", "cuda"),
        ),
        PrecisionSpec(
            name="bf16-true",
            target=f"{where}:BFloat16",
            summary="parameters and computation in bfloat16",
        ),
        PrecisionSpec(
            name="16-true",
            target=f"{where}:Half",
            summary="parameters and computation in float16",
        ),
        PrecisionSpec(
            name="bf16-mixed",
            target=f"{where}:BFloat16Mixed",
            aliases=("bf16",),
            summary="parameters in 32-bit, computation in bfloat16 where that is safe",
        ),
    ]


@hookimpl
def torchweft_launchers() -> list[LauncherSpec]:
    """Who makes the processes of a run on this node, torch's agent, and schedulers."""
    return [
        LauncherSpec(
            name="inline",
            target=f"{_LAUNCHERS}.inline:Inline",
            summary="nobody: one process, the one that runs already",
            priority=100,
            processes="one",
        ),
        LauncherSpec(
            name="script",
            target=f"{_LAUNCHERS}.script:Script",
            summary="python train.py forks into its ranks at fabric.launch()",
            priority=50,
            processes="many",
            detect=f"{_LAUNCHERS}.detect:script",
        ),
        LauncherSpec(
            name="fork",
            target=f"{_LAUNCHERS}.function:Fork",
            summary="fabric.launch(function) in forked processes",
            detect=f"{_LAUNCHERS}.detect:fork",
            function="required",
        ),
        LauncherSpec(
            name="spawn",
            target=f"{_LAUNCHERS}.function:Spawn",
            summary="fabric.launch(function) in fresh interpreters",
            detect=f"{_LAUNCHERS}.detect:spawn",
            function="required",
        ),
        LauncherSpec(
            name="forkserver",
            target=f"{_LAUNCHERS}.function:ForkServer",
            summary="fabric.launch(function) in forks of a fresh process that has imported torch",
            detect=f"{_LAUNCHERS}.detect:forkserver",
            function="required",
        ),
        LauncherSpec(
            name="torchrun",
            target=f"{_LAUNCHERS}.torchrun:Torchrun",
            summary="torch's agent made the processes: torchweft run --devices N, or torchrun",
            priority=200,
            detect=f"{_LAUNCHERS}.detect:torchrun",
            nodes="any",
            outside=True,
            start="torchweft run --devices 2 train.py",
        ),
        LauncherSpec(
            name="mpi",
            target=f"{_LAUNCHERS}.mpi:MPI",
            summary="mpirun or mpiexec made the processes (Open MPI, MPICH, Intel MPI)",
            priority=180,
            detect=f"{_LAUNCHERS}.detect_mpi:mpi",
            nodes="any",
            outside=True,
            start="mpirun -n 2 python train.py",
        ),
        LauncherSpec(
            name="lsf",
            target=f"{_LAUNCHERS}.lsf:LSF",
            summary="jsrun made the processes, in a job of LSF",
            priority=170,
            detect=f"{_LAUNCHERS}.detect_lsf:lsf",
            nodes="any",
            outside=True,
            start="jsrun -n 2 python train.py",
        ),
        LauncherSpec(
            name="kubeflow",
            target=f"{_LAUNCHERS}.kubeflow:Kubeflow",
            summary="Kubeflow made one process in each pod (PyTorchJob, TrainJob)",
            priority=150,
            detect=f"{_LAUNCHERS}.detect_kubeflow:kubeflow",
            nodes="any",
            outside=True,
        ),
        LauncherSpec(
            name="slurm",
            target=f"{_LAUNCHERS}.slurm:Slurm",
            summary="SLURM made the processes: every task of srun is a rank",
            priority=160,
            detect=f"{_LAUNCHERS}.detect_slurm:slurm",
            nodes="any",
            outside=True,
            start="srun -n 2 python train.py",
        ),
    ]
