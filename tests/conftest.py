"""What tests of several folders need."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes on one thread, so that sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
