"""``python -m torchweft`` is the command ``torchweft``."""

from __future__ import annotations

from torchweft.cli import main

# Guarded: a spawned rank imports this file again, under another name.
if __name__ == "__main__":
    main()
