"""The life of a rank's process: what it is told, how it fails, how it ends, how it runs a script.

Free of torch until a rank does something that needs it, so that a rank can be a fresh interpreter
whose script imports torch itself.
"""

from __future__ import annotations

from torchweft.process.begin import (
    ERROR_FILE,
    FIRST_FOLDER,
    as_main_process,
    become_rank,
    claim,
    close_stdin,
    detach_from_parent,
    die_with_parent,
    forget_exit_handlers,
    interpreter_flags,
    open_stdin,
    share_threads,
    usable_cores,
    use_threads,
)
from torchweft.process.collector import collector_off, served, unwarned
from torchweft.process.end import end, exit_status, own_the_end, stay_until_the_end, wind_down
from torchweft.process.failure import (
    done_file,
    format_error,
    joined_file,
    minding_file,
    record_done,
    record_failure,
    record_joined,
    record_minding,
    record_stopping,
    stopping_file,
)
from torchweft.process.files import close_files, flush_files, flush_streams, write_error
from torchweft.process.guard import end_like, fork_guarded
from torchweft.process.marks import Marks
from torchweft.process.memory import oom_kills
from torchweft.process.output import FAILURE, HEADING, Output, outputs, redirect_output
from torchweft.process.outside import end_with_the_others
from torchweft.process.script import run_call, run_module, run_script
from torchweft.process.signals import (
    ENDING,
    GRACE,
    LONG_GRACE,
    NOTICE,
    exit_on_signals,
    held_back,
    in_main_thread,
    interrupt_patience,
    let_in,
    respected,
)
from torchweft.process.stacks import (
    Stacks,
    forget_crash_handler,
    mind_end,
    read_stacks,
    stacks_file,
    tell_stacks,
)

__all__ = [
    "ENDING",
    "ERROR_FILE",
    "FAILURE",
    "FIRST_FOLDER",
    "GRACE",
    "HEADING",
    "LONG_GRACE",
    "Marks",
    "NOTICE",
    "Output",
    "Stacks",
    "as_main_process",
    "become_rank",
    "claim",
    "close_files",
    "close_stdin",
    "collector_off",
    "detach_from_parent",
    "die_with_parent",
    "done_file",
    "end",
    "end_like",
    "end_with_the_others",
    "exit_on_signals",
    "exit_status",
    "flush_files",
    "flush_streams",
    "forget_crash_handler",
    "forget_exit_handlers",
    "fork_guarded",
    "format_error",
    "held_back",
    "in_main_thread",
    "interpreter_flags",
    "interrupt_patience",
    "joined_file",
    "let_in",
    "mind_end",
    "minding_file",
    "oom_kills",
    "open_stdin",
    "outputs",
    "own_the_end",
    "read_stacks",
    "record_done",
    "record_failure",
    "record_joined",
    "record_minding",
    "record_stopping",
    "redirect_output",
    "respected",
    "run_call",
    "run_module",
    "run_script",
    "served",
    "share_threads",
    "stacks_file",
    "stay_until_the_end",
    "stopping_file",
    "tell_stacks",
    "unwarned",
    "usable_cores",
    "use_threads",
    "wind_down",
    "write_error",
]
