import pytest
import torch

from tests.training.loop_cases import forget_accelerate
from tests.training.two_processes import launch_two


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """What two processes wrote, and what they told; once for all tests of a worker."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launch_two(folder)


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_accelerate()
