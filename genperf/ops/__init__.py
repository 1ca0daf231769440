"""The public operators, found by globbing: what each module of this package lists in ``__all__``.

An op and its module share one name; ``genperf.ops.<op>`` is the function. Parts of an op that would make
its module long stand in ``_<op>_*.py``.
"""

import importlib
import pkgutil

for _info in pkgutil.iter_modules(__path__):
    if not _info.name.startswith("_"):
        _module = importlib.import_module(f"{__name__}.{_info.name}")
        globals().update({name: getattr(_module, name) for name in _module.__all__})
