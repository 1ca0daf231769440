"""Patterns, one module a family; see :mod:`genperf.accelerate._pattern`."""
