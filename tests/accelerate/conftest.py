import importlib.util
import pathlib
import sys

import pytest

_spec = importlib.util.spec_from_file_location(
    "accelerate_models", pathlib.Path(__file__).with_name("models.py")
)
_module = importlib.util.module_from_spec(_spec)
sys.modules["accelerate_models"] = _module
_spec.loader.exec_module(_module)


@pytest.fixture(scope="session")
def models():
    """tests/accelerate/models.py, importable by name so that its classes can be pickled."""
    return _module
