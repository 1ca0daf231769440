"""The benchmarks of ``python -m genperf bench``, one file an op; installed as ``genperf.benchmarks``."""
