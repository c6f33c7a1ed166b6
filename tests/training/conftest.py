import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
