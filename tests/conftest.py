"""How examples are drawn, and where extensions are compiled, for every test."""

from __future__ import annotations

import os
import sys

from hypothesis import HealthCheck, settings

# A busy machine is no failure: nothing here is judged by the time that it takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Extensions of one environment are no other's: torch would compile them again and again in turn.
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "extensions"))
