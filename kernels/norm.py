"""The gated RMSNorm of Mamba-2."""

from . import norm_reference as reference
from .backend import use_triton

MAX_SIZE = 16384  # channels of a group, for the Triton kernels: they hold a group in registers


def gated_rms_norm(x, weight, z=None, *, groups=1, eps=1e-6, backend="auto"):
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
        backend: "auto" (Triton kernels on an NVIDIA GPU where they fit), "triton" or "torch" (the plain reference).

    Returns:
        (..., C) in x.dtype.

    Raises:
        ValueError: a shape or groups does not fit; or the backend cannot run.
    """
    reference._check(x, weight, z, groups)
    if not use_triton(backend, x, _unsupported(x, groups)):
        return reference.gated_rms_norm(x, weight, z, groups=groups, eps=eps)
    from . import norm_triton

    return norm_triton.gated_rms_norm(x, weight, z, groups, eps)


def _unsupported(x, groups):
    if x.numel() == 0:
        return "x is empty"
    size = x.shape[-1] // groups
    return f"a group has at most {MAX_SIZE} channels, got {size}" if size > MAX_SIZE else None
