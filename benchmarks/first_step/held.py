"""What every script does behind its first step: it says when that was, and may be looked at."""

import time
from pathlib import Path


def done(stamp: str, first: bool) -> None:
    """Write the time in rank 0; stay for as long as there is ``stamp.hold``, if there is."""
    if first:
        part = Path(f"{stamp}.part")
        part.write_text(repr(time.time()))
        part.replace(stamp)
    while Path(f"{stamp}.hold").exists():
        time.sleep(0.02)
