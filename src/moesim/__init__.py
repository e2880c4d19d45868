"""moesim: which expert-offloading policy is fastest on this machine, for this model, and why."""

from importlib.metadata import version

__version__ = version("moesim")
