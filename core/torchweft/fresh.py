"""The program of a rank that is a fresh interpreter, with FOLDER [-m] SCRIPT ARGUMENTS… .

Imports no torch, so that a script may set variables which torch reads when it is imported.
"""

from __future__ import annotations

import os
import sys

from torchweft import process
from torchweft.handoff import Handoff

__all__ = ["main"]


def main() -> None:
    """Run the script that the command line names, as this rank."""
    handoff = Handoff.read(os.environ)
    if handoff is None or handoff.parent is None:  # the command has died meanwhile
        os._exit(1)
    process.die_with_parent(handoff.parent)
    folder, script, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        marks = process.Marks(folder)
        # torch's agent sends signals to the whole session, guard and rank.
        code = process.fork_guarded(pass_on=False, marks=marks)
        if code is not None:
            process.end_like(code)
    process.claim(os.environ)
    process.share_threads(int(os.environ["LOCAL_WORLD_SIZE"]))
    if os.environ["LOCAL_RANK"] != "0":
        process.close_stdin()
    if handoff.log_dir:
        process.redirect_output(handoff.log_dir, folder)
    sys.path.insert(0, "")  # the script's folder takes the place
    if script == "-m":
        script, *arguments = arguments
        os._exit(process.run_module(script, arguments))
    os._exit(process.run_script(script, arguments))
