"""Which implementation of an op runs, Triton kernels or the PyTorch reference; and what all kernels share."""

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def use_triton(backend: str, tensor: torch.Tensor, unsupported: str | None = None) -> bool:
    """Decide between the Triton kernels (True) and the PyTorch reference (False).

    Args:
        backend: "torch" or "triton" decide by themselves; "auto" takes Triton wherever it can run.
        tensor: the op's main input: its device and dtype count.
        unsupported: why the kernels cannot do what was asked of them, or None if they can.

    Raises:
        ValueError: backend is none of BACKENDS, or it is "triton" and the kernels cannot run; says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend: expected "auto", "triton" or "torch", got {backend!r}')
    if backend == "torch":
        return False
    if backend == "auto" and not tensor.is_cuda:
        return False  # also under Triton's interpreter, which is for tests
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        unsupported = f"the kernels take float16, bfloat16 and float32, got {tensor.dtype}"
    reason = _unavailable(tensor.device) or unsupported
    if reason and backend == "triton":
        raise ValueError(f'backend: "triton" cannot run here: {reason}; use "auto" or "torch"')
    return reason is None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1, set before the first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def inner_contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """t itself, or a copy if its last dimension is not contiguous: all other strides are taken as they are."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


@functools.cache
def sm_count(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power_of_2(n: int) -> int:
    """The least power of two that is not less than n: what Triton asks of a block's size."""
    return 1 << (n - 1).bit_length()


def _unavailable(device: torch.device) -> str | None:
    if not TRITON_INSTALLED:
        return "the package triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    if torch.version.hip:
        return "only NVIDIA GPUs have been tried"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or later, this GPU has {major}.{minor}"
    return None
