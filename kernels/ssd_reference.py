"""State-space duality (Mamba-2) in plain PyTorch: the scan, one decoding step, and the mixing matrix.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t

x, B and C may each have fewer heads than dt and A. Head h of H reads head h // (H/Hx) of x, h // (H/Hb) of B and
h // (H/Hc) of C: consecutive heads share, as query heads share key/value heads in grouped-query attention. Shared
heads are not copied: the heads that share an operand are stacked as rows of one matrix product (_grouped_matmul).

This is the reference: it runs wherever PyTorch does, and faster kernels are tested against it.
"""

import math

import torch
import torch.nn.functional as F

# The fastest of 32, 64, 128 and 256 for forward + backward on CPU (B=2, H=9, K=3, P=N=64; L=256 and L=1024).
DEFAULT_CHUNK_SIZE = 32


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
):
    """Run the recurrence over whole sequences, by chunks (Dao and Gu 2024, arXiv 2405.21060, section 6, listing 1).

    Everything is computed in float32 (float64 if x is float64), under autocast too. Differentiable in every floating
    argument.

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
        chunk_size: the most tokens a chunk may have; None takes the one measured to be fastest on CPU.

    Returns:
        y (B, L, H, P) in x.dtype; with return_final_state, (y, state), where state (B, H, P, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of heads, L = 0, chunk_size or the type of seq_idx does not fit.
    """
    check_scan(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, chunk_size)
    batch, length, heads = dt.shape
    if chunk_size is None:
        chunk_size = DEFAULT_CHUNK_SIZE

    with torch.autocast(x.device.type, enabled=False):
        dtype = _compute_dtype(x)
        chunks = math.ceil(length / chunk_size)
        padding = -length % chunks  # chunks of equal length: 65 tokens are two chunks of 33, not of 64

        def by_chunk(t):  # (B, L, heads, ...) -> (B, c, heads, Q, ...), zeros after the last token
            t = F.pad(t.to(dtype), (0, 0) * (t.dim() - 2) + (0, padding))
            return t.unflatten(1, (chunks, -1)).transpose(2, 3).contiguous()

        # After padding, dt = 0: a padded token adds nothing to the state and does not decay it.
        dt = by_chunk(_step_sizes(dt, dt_bias, dt_softplus, dtype))
        x_, Bt, C_ = by_chunk(x), by_chunk(B).mT.contiguous(), by_chunk(C)
        within, to_end, from_start = _decays(dt * A.to(dtype)[:, None], _documents(seq_idx, chunks, padding))

        y = _grouped_matmul(_scale_heads(_grouped_matmul(C_, Bt), within * dt.unsqueeze(-2)), x_)
        if D is not None:
            y = y + _scale_heads(x_, D.to(dtype)[:, None, None])
        state = None if initial_state is None else initial_state.to(dtype).mT  # (N, P) in here
        if chunks > 1 or state is not None or return_final_state:
            added = _chunk_states(x_, Bt, to_end * dt)
            entering, state = _pass_states(added, from_start[..., -1], state)
            y = torch.addcmul(y, _grouped_matmul(C_, entering), from_start.unsqueeze(-1))
        y = y.transpose(2, 3).flatten(1, 2)[:, :length].to(x.dtype)
    return (y, state.mT.contiguous()) if return_final_state else y


@torch.no_grad()
def ssd_step(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=True):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, H, P, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        x: (B, Hx, P); dt: (B, H); A: (H,); B: (B, Hb, N); C: (B, Hc, N); D, dt_bias: (H,) or None: as in ssd_scan, for
            one token.

    Returns:
        y (B, H, P) in x.dtype.

    Raises:
        ValueError: a shape or a number of heads does not fit.
    """
    check_step(state, x, dt, A, B, C, D, dt_bias)
    heads = dt.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(_compute_dtype(x), state.dtype)
        dt = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        x_, B_, C_ = (t.to(dtype).repeat_interleave(heads // t.shape[1], 1) for t in (x, B, C))
        decay = torch.exp(dt * A.to(dtype))[..., None, None]
        new = torch.addcmul(state * decay, (dt.unsqueeze(-1) * x_).unsqueeze(-1), B_.unsqueeze(-2))
        state.copy_(new)
        y = (new @ C_.unsqueeze(-1)).squeeze(-1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * x_
    return y.to(x.dtype)


def ssd_matrix(dt, A, B, C, *, dt_bias=None, dt_softplus=True):
    """Materialise the mixing matrix: y = ssd_matrix(...) @ x is ssd_scan without D and initial state.

    M[t, s] = C_t . B_s dt_s exp(sum_{j=s+1..t} dt_j A) for s <= t, zero above the diagonal (Dao and Gu 2024,
    arXiv 2405.21060, equation 3 with dt discretising B). It is the counterpart of an attention matrix.

    Args:
        dt: (B, L, H); A: (H,); B: (B, L, Hb, N); C: (B, L, Hc, N); dt_bias: (H,) or None: as in ssd_scan.

    Returns:
        (B, H, L, L) float32 (float64 if C is float64). Memory grows with L squared.

    Raises:
        ValueError: a shape or a number of heads does not fit.
    """
    _check_inputs(None, dt, A, B, C, None, dt_bias, leading="B, L")
    with torch.autocast(C.device.type, enabled=False):
        dtype = _compute_dtype(C)
        dt = _step_sizes(dt, dt_bias, dt_softplus, dtype).mT
        within, _, _ = _decays((dt * A.to(dtype)[:, None]).unsqueeze(1), None)
        scores = _grouped_matmul(C.to(dtype).transpose(1, 2), B.to(dtype).permute(0, 2, 3, 1))
        return _scale_heads(scores, within.squeeze(1) * dt.unsqueeze(-2))


def check_scan(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, chunk_size):
    """Raise a ValueError if the arguments of ssd_scan do not fit together."""
    _check_inputs(x, dt, A, B, C, D, dt_bias, leading="B, L")
    batch, length, _ = dt.shape
    if batch == 0 or length == 0:
        raise ValueError(f"x: expected at least one token, got {'B' if batch == 0 else 'L'} = 0")
    _check_options(dt, initial_state, (x.shape[-1], B.shape[-1]), seq_idx, chunk_size)


def _check_options(per_head, initial_state, state, seq_idx, chunk_size):
    """Check what a scan may be given besides its inputs; per_head: (B, L, H), state: (P, N)."""
    batch, length, heads = per_head.shape
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "B, H, P, N", (batch, heads, *state))
    if seq_idx is not None:
        _check_shape("seq_idx", seq_idx, "B, L", (batch, length))
        if seq_idx.is_floating_point() or seq_idx.is_complex():
            raise ValueError(f"seq_idx: expected integers, got {seq_idx.dtype}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive integer, got {chunk_size}")


def check_step(state, x, dt, A, B, C, D, dt_bias):
    """Raise a ValueError if the arguments of ssd_step do not fit together."""
    _check_inputs(x, dt, A, B, C, D, dt_bias, leading="B")
    _check_shape("state", state, "B, H, P, N", (*dt.shape, x.shape[-1], B.shape[-1]))


def _decays(log_decay, document):
    """Decay factors inside each chunk, from the per-token log decays (..., c, H, Q) and documents (B, c, Q) or None.

    Returns (all zero across documents):
        within (B, c, H, Q, Q): from after token s to token t, for s <= t, else zero;
        to_end (B, c, H, Q): from after token s to the end of the chunk;
        from_start (B, c, H, Q): from the start of the chunk to token t, the latter included.
    """
    total = log_decay.cumsum(-1)
    size = total.shape[-1]
    # Exponents are differences of sums, taken before exp: exp(a_t) * exp(-a_s) would overflow. Where s > t the
    # difference is positive, so it is masked before exp, which also keeps NaN out of the gradient.
    within = total.unsqueeze(-1) - total.unsqueeze(-2)
    to_end = total[..., -1:] - total
    from_start = total
    masked = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    if document is not None:
        document = document.unsqueeze(2)
        last = document[..., -1:]
        before = torch.cat([document[:, :1, :, :1], last[:, :-1]], 1)  # that of the state entering each chunk
        masked = masked | (document.unsqueeze(-1) != document.unsqueeze(-2))
        to_end = to_end.masked_fill(document != last, -math.inf)
        from_start = from_start.masked_fill(document != before, -math.inf)
    return within.masked_fill(masked, -math.inf).exp(), to_end.exp(), from_start.exp()


def _chunk_states(x, Bt, weight):
    """What each chunk adds to the state, sum_s weight_s B_s x_s^T: (B, c, H, N, P)."""
    if x.shape[2] <= Bt.shape[2]:  # scale the one with more heads: it grows to H heads
        return _grouped_matmul(_scale_heads(Bt, weight.unsqueeze(-2)), x)
    return _grouped_matmul(Bt, _scale_heads(x, weight.unsqueeze(-1)))


def _pass_states(added, decay, state):
    """The recurrence over chunks: states entering each chunk (B, c, H, N, P) and the last state (B, H, N, P)."""
    if state is None:
        state = torch.zeros_like(added[:, 0])
    entering = []
    for new, factor in zip(added.unbind(1), decay[..., None, None].unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(new, factor, state)
    return torch.stack(entering, 1), state


def _grouped_matmul(left, right):
    """left (..., Hl, m, k) @ right (..., Hr, k, n) where heads are shared: (..., lcm(Hl, Hr), m, n)."""
    left_heads, right_heads = left.shape[-3], right.shape[-3]
    if left_heads % right_heads == 0:  # stack the rows of the left heads that share a right head
        rows = left.reshape(*left.shape[:-3], right_heads, -1, left.shape[-1])
        return (rows @ right).unflatten(-2, (left_heads // right_heads, -1)).flatten(-4, -3)
    if right_heads % left_heads == 0:
        return _grouped_matmul(right.mT, left.mT).mT
    heads = math.lcm(left_heads, right_heads)
    return left.repeat_interleave(heads // left_heads, -3) @ right.repeat_interleave(heads // right_heads, -3)


def _scale_heads(t, factor):
    """t (..., heads, m, n) * factor (..., H, m or 1, n or 1), where heads divides H: (..., H, m, n)."""
    heads = t.shape[-3]
    return (t.unsqueeze(-3) * factor.unflatten(-3, (heads, -1))).flatten(-4, -3)


def _documents(seq_idx, chunks, padding):
    """Number the documents of each row in order: (B, c, Q); padding belongs to the last one."""
    if seq_idx is None:
        return None
    number = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).cumsum(1), (1, 0))
    number = torch.cat([number, number[:, -1:].expand(-1, padding)], 1)
    return number.unflatten(1, (chunks, -1))


def _step_sizes(dt, dt_bias, dt_softplus, dtype):
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _compute_dtype(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_inputs(x, dt, A, B, C, D, dt_bias, leading):
    """Check the arguments that all functions share; leading names the dimensions before the heads."""
    dims = len(leading.split(", "))
    if dt.dim() != dims + 1:
        raise ValueError(f"dt: expected shape ({leading}, H), got {tuple(dt.shape)}")
    heads = dt.shape[-1]
    for name, t, last in (("x", x, "P"), ("B", B, "N"), ("C", C, "N")):
        if t is None:
            continue
        if t.dim() != dims + 2 or t.shape[:dims] != dt.shape[:dims]:
            raise ValueError(
                f"{name}: expected shape ({leading}, heads, {last}) with ({leading}) = {tuple(dt.shape[:dims])}, "
                f"got {tuple(t.shape)}"
            )
        if t.shape[dims] == 0 or heads % t.shape[dims]:
            raise ValueError(f"{name}: expected a number of heads that divides H = {heads}, got {t.shape[dims]}")
    if B.shape[-1] != C.shape[-1]:
        raise ValueError(f"C: expected the state size of B, N = {B.shape[-1]}, got {C.shape[-1]}")
    for name, t in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if t is not None:
            _check_shape(name, t, "H", (heads,))


def _check_shape(name, t, dims, shape):
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape ({dims}) = {shape}, got {tuple(t.shape)}")
