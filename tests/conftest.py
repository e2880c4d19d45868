"""Settings of all tests: property tests have no deadline, since nothing here measures time."""

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

settings.register_profile(
    "moesim", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("moesim")

# What tests compile is kept from one run to the next, apart from what the user has compiled.
os.environ.setdefault(
    "MOESIM_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "moesim")
)
