import pytest
import torch

from tests.training.loop_cases import forget_accelerate


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_accelerate()
