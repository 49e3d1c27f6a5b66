"""The program of a rank that is a fresh interpreter: ``python -m torchweft.fresh train.py …``.

Imports no torch, so that a script may set variables which torch reads when it is imported.
"""

from __future__ import annotations

import os
import sys

from torchweft import process

__all__ = ["main"]


def main() -> None:
    """Run the script that the command line names, as this rank."""
    process.die_with_parent(os.getppid())
    process.share_threads(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        process.close_stdin()
    script, *arguments = sys.argv[1:]
    os._exit(process.run_script(script, arguments))


if __name__ == "__main__":
    main()
