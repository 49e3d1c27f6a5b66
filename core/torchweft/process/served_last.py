"""What a fork server imports last: whatever it has made stays, and ranks share it untouched."""

from __future__ import annotations

import gc

gc.freeze()
gc.enable()
