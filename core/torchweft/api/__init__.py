"""Base classes for backends: the one place that plugin authors import from."""

from torchweft.api.accelerator import Accelerator
from torchweft.api.batch import map_leaves, move_batch
from torchweft.api.collectives import Alone, Collectives, ProcessGroup
from torchweft.api.distributed import DistributedStrategy
from torchweft.api.folder import FolderLayout, Foreign
from torchweft.api.group import Group, join_group, leave_group, open_store
from torchweft.api.launcher import Launcher
from torchweft.api.place import Place
from torchweft.api.precision import Autocast, Precision
from torchweft.api.result import pack_result
from torchweft.api.run import Run
from torchweft.api.strategy import CAPABILITIES, DataShard, Prepared, Strategy
from torchweft.plan import Decision, Rejected, RunPlan, Topology
from torchweft.rank import RankInfo, Rendezvous

__all__ = [
    "CAPABILITIES",
    "Accelerator",
    "Alone",
    "Autocast",
    "Collectives",
    "DataShard",
    "Decision",
    "DistributedStrategy",
    "FolderLayout",
    "Foreign",
    "Group",
    "Launcher",
    "Place",
    "Precision",
    "Prepared",
    "ProcessGroup",
    "RankInfo",
    "Rejected",
    "Rendezvous",
    "Run",
    "RunPlan",
    "Strategy",
    "Topology",
    "join_group",
    "leave_group",
    "map_leaves",
    "move_batch",
    "open_store",
    "pack_result",
]
