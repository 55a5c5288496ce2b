"""The gated RMSNorm of Mamba-2 in plain PyTorch."""

import torch
import torch.nn.functional as F


def gated_rms_norm(x, weight, z=None, *, groups=1, eps=1e-6):
    """RMS-normalise x * silu(z) over each of `groups` equal slices of the last dimension, times weight.

    The gate comes first, then the norm, as in Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7.1; norm_before_gate
    = False in its code); the norm is that of Zhang and Sennrich 2019 (arXiv 1910.07467, equation 4). Computed in
    float32 (float64 if x is float64). Differentiable in x, weight and z.

    Args:
        x: (..., C).
        weight: (C,).
        z: (..., C) gate of x's shape, or None for no gate.
        groups: the number of slices, a divisor of C; slice g covers channels g C/groups to (g+1) C/groups - 1.
        eps: added to the mean square.

    Returns:
        (..., C) in x.dtype.

    Raises:
        ValueError: a shape or groups does not fit.
    """
    _check(x, weight, z, groups)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gated = x.to(dtype) if z is None else x.to(dtype) * F.silu(z.to(dtype))
    sliced = gated.unflatten(-1, (groups, -1))
    normed = sliced * torch.rsqrt(sliced.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.to(dtype)).to(x.dtype)


def _check(x, weight, z, groups):
    channels = x.shape[-1]
    if tuple(weight.shape) != (channels,):
        raise ValueError(f"weight: expected shape (C) = ({channels},), got {tuple(weight.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z: expected the shape of x, {tuple(x.shape)}, got {tuple(z.shape)}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of C = {channels}, got {groups}")
