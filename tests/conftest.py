"""Settings of all tests: property tests have no deadline, since nothing here measures time."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "moesim", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("moesim")
