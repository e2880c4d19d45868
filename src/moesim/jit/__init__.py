"""Compile what is written as plain Python, with Numba: the one place that knows it."""
