"""What a launcher of a plugin needs beside its base class: ranks in processes that it makes itself.

Free of torch, so that a rank can be a fresh interpreter whose script sets variables which torch
reads when it is imported. In the process that watches: ``Handoff`` and ``RankInfo.to_environ`` say
what a rank's environment holds, ``read_failure`` reads what it left in the file that ``ERROR_FILE``
named, and ``report`` makes one error of all failures. In the rank: ``die_with_parent``, ``claim``,
then ``run_script``, ``run_module`` or ``run_call``, and ``os._exit`` with what it gives.
"""

from __future__ import annotations

from torchweft.failures import Failure, read_failure, report
from torchweft.handoff import Handoff
from torchweft.process import (
    ERROR_FILE,
    GRACE,
    LONG_GRACE,
    NOTICE,
    claim,
    collector_off,
    die_with_parent,
    done_file,
    in_main_thread,
    interpreter_flags,
    interrupt_patience,
    record_failure,
    respected,
    run_call,
    run_module,
    run_script,
    write_error,
)

__all__ = [
    "ERROR_FILE",
    "GRACE",
    "LONG_GRACE",
    "NOTICE",
    "Failure",
    "Handoff",
    "claim",
    "collector_off",
    "die_with_parent",
    "done_file",
    "in_main_thread",
    "interpreter_flags",
    "interrupt_patience",
    "read_failure",
    "record_failure",
    "report",
    "respected",
    "run_call",
    "run_module",
    "run_script",
    "write_error",
]
