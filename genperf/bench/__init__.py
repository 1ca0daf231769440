"""Microbenchmarks: what each kernel gains on this machine, against eager torch, ``torch.compile``, the
library that people use today, and the hardware's limit.

A benchmark is a :class:`Benchmark` in ``benchmarks/ops/bench_<op>.py``; ``python -m genperf bench`` finds it.
"""

from .case import Benchmark, Case, CheckError, discover

__all__ = ["Benchmark", "Case", "CheckError", "discover"]
