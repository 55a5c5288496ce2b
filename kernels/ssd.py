"""State-space duality (Mamba-2): the scan over whole sequences, one decoding step, and the mixing matrix.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

x, B and C may each have fewer heads than dt and A. Head h of H reads head h // (H/Hx) of x, h // (H/Hb) of B and
h // (H/Hc) of C: consecutive heads share, as query heads share key/value heads in grouped-query attention. Shared heads
are never copied. ssd_reference.py has the same functions in plain PyTorch, ssd_triton.py the kernels.
"""

import torch

from . import ssd_reference as reference
from .backend import inner_contiguous, use_triton
from .ssd_reference import ssd_matrix

__all__ = ["ssd_matrix", "ssd_scan", "ssd_step"]


def ssd_scan(
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
    chunk_size=None,
    backend="auto",
):
    """Run the recurrence over whole sequences, by chunks (Dao and Gu 2024, arXiv 2405.21060, section 6, listing 1).

    States, decays and sums are float32 (float64 if x is float64), under autocast too. The kernels multiply matrices in
    the common dtype of x, B and C, accumulating in float32; the reference does in float32. Differentiable in every
    floating argument; the kernels once only.

    Args:
        x: (B, L, Hx, P) inputs ("values"). Hx, Hb and Hc must each divide H.
        dt: (B, L, H) step sizes, before the bias and the softplus.
        A: (H,) negative decay rates.
        B: (B, L, Hb, N) input maps ("keys").
        C: (B, L, Hc, N) output maps ("queries").
        D: (H,) skip weights, or None for no skip.
        dt_bias: (H,) added to dt, or None.
        dt_softplus: apply softplus to dt + dt_bias; without it, dt + dt_bias must be >= 0.
        initial_state: (B, H, P, N) state before the first token, or None for zeros.
        seq_idx: (B, L) integers, the document of each token. The state is reset to zero wherever the value changes;
            initial_state belongs to the document of the first token.
        return_final_state: also return the state after the last token.
        chunk_size: the most tokens a chunk may have; None takes the one measured to be fastest. The kernels round it to
            a power of two from 16 to 128.
        backend: "triton" or "torch"; "auto" takes the kernels wherever they can run.

    Returns:
        y (B, L, H, P) in x.dtype; with return_final_state, (y, state), where state (B, H, P, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of heads, L = 0, chunk_size or the type of seq_idx does not fit; or backend is
            "triton" and the kernels cannot run.
        RuntimeError: a second derivative through the kernels.
    """
    optional = {"D": D, "dt_bias": dt_bias, "initial_state": initial_state, "seq_idx": seq_idx}
    unsupported = f"the kernels take a state of at most 256, got {B.shape[-1]}" if B.shape[-1] > 256 else None
    if not use_triton(backend, x, unsupported):
        return reference.ssd_scan(
            x, dt, A, B, C, **optional, dt_softplus=dt_softplus, return_final_state=return_final_state,
            chunk_size=chunk_size,
        )  # fmt: skip
    reference.check_scan(x, dt, A, B, C, **optional, chunk_size=chunk_size)
    from . import ssd_triton

    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    x_, B, C = (inner_contiguous(t.to(dtype)) for t in (x, B, C))
    A, D, dt_bias = (inner_contiguous(t) for t in (A, D, dt_bias))
    tensors = [x, dt, A, B, C, D, dt_bias, initial_state]
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    options = dt_softplus, return_final_state, chunk_size, training
    size = ssd_triton.part_size(x.shape[-1], B.shape[-1])
    if x.shape[-1] <= size:
        initial = None if initial_state is None else initial_state.contiguous()
        y, state, *_ = ssd_triton.ssd_scan(x_, dt, A, B, C, D, dt_bias, initial, seq_idx, *options)
    else:  # rows of the state do not interact: more of them than fit in registers go part by part
        ys, states = [], []
        for start in range(0, x.shape[-1], size):
            part = slice(start, start + size)
            initial = None if initial_state is None else initial_state[:, :, part].contiguous()
            y, state, *_ = ssd_triton.ssd_scan(x_[..., part], dt, A, B, C, D, dt_bias, initial, seq_idx, *options)
            ys.append(y)
            states.append(state)
        y, state = torch.cat(ys, -1), torch.cat(states, 2)
    y = y.to(x.dtype)
    return (y, state) if return_final_state else y


@torch.no_grad()
def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=True, backend="auto"):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, H, P, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        x: (B, Hx, P); dt: (B, H); A: (H,); B: (B, Hb, N); C: (B, Hc, N); D, dt_bias: (H,) or None; backend: as in
            ssd_scan, for one token.

    Returns:
        y (B, H, P) in x.dtype.

    Raises:
        ValueError: a shape or a number of heads does not fit; or backend is "triton" and the kernel cannot run.
    """
    unsupported = None
    if state.stride(-1) != 1 or state.dtype == torch.float64:
        unsupported = "the kernel takes a state that is contiguous along N, and not float64"
    if not use_triton(backend, x, unsupported):
        return reference.ssd_step(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    reference.check_step(state, x, dt, A, B, C, D, dt_bias)
    from .ssd_step_triton import ssd_step as step

    x, A, B, C, D, dt_bias = (inner_contiguous(t) for t in (x, A, B, C, D, dt_bias))
    return step(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
