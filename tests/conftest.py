import pytest
import torch
from hypothesis import settings

settings.register_profile("transpoint", deadline=None)  # a busy machine is no failure
settings.load_profile("transpoint")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors here are tiny: a second thread only adds waiting, milliseconds an operation on a busy machine."""
    torch.set_num_threads(1)
