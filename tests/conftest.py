"""How examples are drawn, for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is no failure: nothing here is judged by the time that it takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
