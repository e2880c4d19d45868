"""Models and machines that ship with moesim; measuring a machine."""
