"""What a fork server imports first: until its last import it looks for no garbage."""

from __future__ import annotations

import gc

gc.disable()
