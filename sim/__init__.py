"""Simulated machines, and what a run is measured by."""
