"""Mamba-1's selective scan in plain PyTorch: over whole sequences, and one decoding step.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t + D x_t

(Gu and Dao 2023, arXiv 2312.00752, algorithm 2.) Each of the d channels has a state of N numbers, each of them its own
decay, and each channel its own steps: what Mamba-2 has once for each head.

B and C may each have fewer groups than there are channels: channel i of d reads group i // (d/G). This is the
reference: it runs wherever PyTorch does.
"""

import torch
from torch.utils.checkpoint import checkpoint

from .ssd_reference import _check_shape, _compute_dtype, _step_sizes

PIECE = 64  # tokens whose states are held at a time; in training they are computed once more


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
):
    """Run the recurrence over whole sequences, token by token.

    Everything is computed in float32 (float64 if x is float64), under autocast too. Differentiable in every floating
    argument.

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

    Returns:
        y (B, L, d) in x.dtype; with return_final_state, (y, state), where state (B, d, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of groups, L = 0 or the type of seq_idx does not fit.
    """
    check_scan(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx)
    with torch.autocast(x.device.type, enabled=False):
        dtype = _compute_dtype(x)
        inputs, A = x.to(dtype), A.to(dtype)
        steps = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        state = A.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.to(dtype)
        starts = torch.zeros_like(x[..., 0], dtype=torch.bool)  # whether the token is the first of a new document
        if seq_idx is not None:
            starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        again = torch.is_grad_enabled() and x.shape[1] > PIECE and not torch.compiler.is_compiling()
        ys = []
        for piece in zip(*(t.split(PIECE, 1) for t in (inputs, steps, B.to(dtype), C.to(dtype), starts)), strict=True):
            args = (*piece, A, state)
            y, state = checkpoint(_piece, *args, use_reentrant=False) if again else _piece(*args)
            ys.append(y)
        y = torch.cat(ys, 1)
        y = (y if D is None else y + D.to(dtype) * inputs).to(x.dtype)
    return (y, state) if return_final_state else y


@torch.no_grad()
def selective_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=True):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, d, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        x, dt: (B, d); B: (B, Gb, N); C: (B, Gc, N); others as in selective_scan.

    Returns:
        y (B, d) in x.dtype.

    Raises:
        ValueError: a shape or a number of groups does not fit.
    """
    check_step(state, x, dt, A, B, C, D, dt_bias)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(_compute_dtype(x), state.dtype)
        inputs, steps = x.to(dtype), _step_sizes(dt, dt_bias, dt_softplus, dtype)
        B, C = (t.to(dtype).repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
        new = (steps.unsqueeze(-1) * A.to(dtype)).exp() * state + (steps * inputs).unsqueeze(-1) * B
        state.copy_(new)
        y = (new * C).sum(-1)
        return (y if D is None else y + D.to(dtype) * inputs).to(x.dtype)


def _piece(x, dt, B, C, starts, A, state):
    """y (B, l, d) of some tokens, without the skip, and the state (B, d, N) after them, from the state before."""
    decay = (dt.unsqueeze(-1) * A).exp().masked_fill(starts[..., None, None], 0)
    added = (dt * x).unsqueeze(-1) * B.repeat_interleave(x.shape[-1] // B.shape[2], 2)
    states = []
    for factor, new in zip(decay.unbind(1), added.unbind(1), strict=True):
        state = torch.addcmul(new, factor, state)
        states.append(state)
    read = torch.stack(states, 1).unflatten(2, (C.shape[2], -1)) @ C.unsqueeze(-1)
    return read.flatten(2), state


def check_scan(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx):
    """Raise a ValueError if the arguments of selective_scan do not fit together."""
    _check_inputs(x, dt, A, B, C, D, dt_bias, "B, L")
    batch, length, channels = x.shape
    if batch == 0 or length == 0:
        raise ValueError(f"x: expected at least one token, got {'B' if batch == 0 else 'L'} = 0")
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "B, d, N", (batch, channels, A.shape[1]))
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, "B, L", (batch, length))
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ValueError(f"seq_idx: expected integers, got {seq_idx.dtype}")


def check_step(state, x, dt, A, B, C, D, dt_bias):
    """Raise a ValueError if the arguments of selective_step do not fit together."""
    _check_inputs(x, dt, A, B, C, D, dt_bias, "B")
    _check_shape("state", state, "B, d, N", (*x.shape, A.shape[1]))


def _check_inputs(x, dt, A, B, C, D, dt_bias, leading):
    """Check the arguments that all functions share; leading names the dimensions before the channels."""
    dims = len(leading.split(", "))
    if x.dim() != dims + 1:
        raise ValueError(f"x: expected shape ({leading}, d), got {tuple(x.shape)}")
    first, channels = tuple(x.shape[:dims]), x.shape[-1]
    _check_shape("dt", dt, f"{leading}, d", tuple(x.shape))
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A: expected shape (d, N) with d = {channels}, got {tuple(A.shape)}")
    for name, t in (("B", B), ("C", C)):
        if t.dim() != dims + 2 or tuple(t.shape[:dims]) != first or t.shape[-1] != A.shape[1]:
            raise ValueError(
                f"{name}: expected shape ({leading}, groups, N) with ({leading}) = {first} and N = {A.shape[1]}, "
                f"got {tuple(t.shape)}"
            )
        if t.shape[dims] == 0 or channels % t.shape[dims]:
            raise ValueError(f"{name}: expected a number of groups that divides d = {channels}, got {t.shape[dims]}")
    for name, t in (("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            _check_shape(name, t, "d", (channels,))
