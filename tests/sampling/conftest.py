import pytest
import torch


@pytest.fixture
def no_process_group(monkeypatch):
    """As if torch.distributed was not initialised, whatever test of another folder ran in this process."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
