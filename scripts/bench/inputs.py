"""Random tensors, and the few ways in which inputs are rearranged."""

import functools

import torch
from torch import Tensor


def randn(shape: tuple, device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device, generator=generator(device.type)) * scale).to(dtype)


def uniform(low: float, high: float, size: int, device: torch.device) -> Tensor:
    return torch.empty(size, device=device).uniform_(low, high, generator=generator(device.type))


def expand(t: Tensor, heads: int) -> Tensor:
    """Repeat the heads, the last dimension but one, until there are `heads`."""
    return t.repeat_interleave(heads // t.shape[-2], -2) if t.shape[-2] != heads else t


def leaf(t: Tensor) -> Tensor:
    return t.detach().contiguous().requires_grad_()


@functools.cache
def generator(kind: str) -> torch.Generator:
    """Our own, of the current device: a capture that fails leaves PyTorch's default generator unusable."""
    return torch.Generator(kind).manual_seed(0)
