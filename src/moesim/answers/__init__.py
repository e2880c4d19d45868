"""Answers made of many replays: comparisons, sweeps, advice, pictures and reports."""
