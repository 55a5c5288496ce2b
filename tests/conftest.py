import gc
import os

import pytest
import torch
from hypothesis import settings

from interpreter import make_quick

# Triton reads this at its first import: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    make_quick()

settings.register_profile("transpoint", deadline=None)  # a busy machine is no failure
settings.load_profile("transpoint")

gc.disable()  # until everything is imported


@pytest.fixture(autouse=True, scope="session")
def collect():
    gc.enable()
    yield
    gc.unfreeze()  # or some would be told of as leaks


@pytest.fixture(autouse=True, scope="module")
def collect_no_modules(collect):
    """Else each collection, such as that after a stage of training, looks through all modules: half a second. Many are
    imported, and fixtures made, by the tests before."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors here are tiny: a second thread only adds waiting, milliseconds an operation on a busy machine."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
