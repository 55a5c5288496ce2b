"""Mamba-1's selective scan: over whole sequences, and one decoding step.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t + D x_t

(Gu and Dao 2023, arXiv 2312.00752, algorithm 2.) B and C may each have fewer groups than there are channels: channel i
of d reads group i // (d/G). selective_reference.py has the same functions in plain PyTorch, selective_triton.py the
kernels.
"""

import torch

from . import selective_reference as reference
from .backend import inner_contiguous, use_triton

__all__ = ["selective_scan", "selective_step"]


def selective_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    dt_bias=None,
    dt_softplus=True,
    initial_state=None,
    seq_idx=None,
    return_final_state=False,
    backend="auto",
):
    """Run the recurrence over whole sequences.

    Everything is computed in float32 (float64 if x is float64), under autocast too; of the states that the kernels keep
    for the backward pass, one in 8, x's dtype is. Differentiable in every floating argument; the kernels once only.

    Args:
        x: (B, L, d) inputs.
        dt: (B, L, d) step sizes, before dt_bias and softplus.
        A: (d, N) logarithms of the decay for a step of 1, at most 0.
        B: (B, L, Gb, N) input maps; C: (B, L, Gc, N) output maps. Gb and Gc must each divide d.
        D: (d,) skip, or None.
        dt_bias: (d,) added to dt, or None.
        dt_softplus: whether steps are softplus(dt + dt_bias), or dt + dt_bias itself, which is then to be at least 0.
        initial_state: (B, d, N) state before the first token, or None for zeros.
        seq_idx: (B, L) integers, the document of each token. The state is reset to zero wherever the value changes;
            initial_state belongs to the document of the first token.
        return_final_state: also return the state after the last token.
        backend: "triton" or "torch"; "auto" takes the kernels wherever they can run.

    Returns:
        y (B, L, d) in x.dtype; with return_final_state, (y, state), where state (B, d, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of groups, L = 0 or the type of seq_idx does not fit; or backend is "triton" and
            the kernels cannot run.
        RuntimeError: a second derivative through the kernels.
    """
    optional = {"D": D, "dt_bias": dt_bias, "initial_state": initial_state, "seq_idx": seq_idx}
    unsupported = f"the kernels take a state of at most 128, got {A.shape[-1]}" if A.shape[-1] > 128 else None
    if not use_triton(backend, x, unsupported):
        options = {"dt_softplus": dt_softplus, "return_final_state": return_final_state}
        return reference.selective_scan(x, dt, A, B, C, **optional, **options)
    reference.check_scan(x, dt, A, B, C, **optional)
    from . import selective_triton

    x, dt, B, C = (inner_contiguous(t) for t in (x, dt, B, C))
    A, D, dt_bias, initial_state = (None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state))
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, _ = selective_triton.selective_scan(
        x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, dt_softplus, return_final_state, training
    )
    return (y, state) if return_final_state else y


@torch.no_grad()
def selective_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=True, backend="auto"):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, d, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        x: (B, d); dt: (B, d); B: (B, Gb, N); C: (B, Gc, N); others as in selective_scan, for one token.

    Returns:
        y (B, d) in x.dtype.

    Raises:
        ValueError: a shape or a number of groups does not fit; or backend is "triton" and the kernel cannot run.
    """
    unsupported = None
    if state.stride(-1) != 1 or state.dtype == torch.float64:
        unsupported = "the kernel takes a state that is contiguous along N, and not float64"
    if not use_triton(backend, x, unsupported):
        return reference.selective_step(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    reference.check_step(state, x, dt, A, B, C, D, dt_bias)
    from .selective_step_triton import selective_step as step

    x, dt, A, B, C, D, dt_bias = (inner_contiguous(t) for t in (x, dt, A, B, C, D, dt_bias))
    return step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
