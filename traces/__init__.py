"""Routing traces: format, workloads cut from them, generator, statistics, predictors."""
