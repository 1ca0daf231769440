import importlib.util
import pathlib
import sys
import time

import pytest
import torch


def _load(name, file):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_models = _load("accelerate_models", "models.py")
_loops = _load("accelerate_pixel_loops", "pixel_loops.py")
_quantizers = _load("accelerate_quantizers", "quantizers.py")
_flows = _load("accelerate_flows", "flows.py")
_logistics = _load("accelerate_logistics", "logistics.py")


@pytest.fixture(scope="session")
def models():
    """tests/accelerate/models.py, importable by name so that its classes can be pickled."""
    return _models


@pytest.fixture(scope="session")
def loops():
    """tests/accelerate/pixel_loops.py, importable by name."""
    return _loops


@pytest.fixture(scope="session")
def quantizers():
    """tests/accelerate/quantizers.py, importable by name."""
    return _quantizers


@pytest.fixture(scope="session")
def flows():
    """tests/accelerate/flows.py, importable by name."""
    return _flows


@pytest.fixture(scope="session")
def logistics():
    """tests/accelerate/logistics.py, importable by name."""
    return _logistics


@pytest.fixture(scope="session")
def process_group(tmp_path_factory):
    """torch.distributed with one process; yields a list for what must live until its end.

    torch deadlocks if the last reference to a gloo group goes while its thread still releases a finished work
    (both want the interpreter's lock).
    """
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    kept = []
    yield kept
    time.sleep(1)
    torch.distributed.destroy_process_group()
