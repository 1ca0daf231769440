"""Make an existing model faster in place: ``genperf.accelerate(model)``.

The package is itself callable, because importing a submodule binds its name on the parent:
``genperf.accelerate`` is this module once anything here was imported, and calling it means
:func:`genperf.accelerate.accelerate` in either order of imports.
"""

import sys
import types

from genperf.accelerate._accelerate import accelerate
from genperf.accelerate._distributions import Distributions, distributions
from genperf.accelerate._namespace import Namespace, namespace
from genperf.accelerate._report import Entry, Report
from genperf.accelerate._verify import Verification

__all__ = [
    "Distributions",
    "Entry",
    "Namespace",
    "Report",
    "Verification",
    "accelerate",
    "distributions",
    "namespace",
]


class _CallableModule(types.ModuleType):
    __call__ = staticmethod(accelerate)


sys.modules[__name__].__class__ = _CallableModule
