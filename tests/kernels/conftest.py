import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Where Triton kernels run: compiled on the GPU, or interpreted on the CPU (see tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def fill_new_tensors_with_nan():
    """What a kernel leaves unwritten is then found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def forget_launches():
    """Tests that change launch parameters find them used."""
    from transpoint.kernels import launch

    launch.forget()
