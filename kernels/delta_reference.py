"""The gated delta rule (gated DeltaNet) in plain PyTorch: the scan over whole sequences, and one decoding step.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        y_t = S_t q_t

(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.) What the state holds under a key is replaced by the
token's value, wholly at beta = 1 for keys of length 1, and not only added to, as in Mamba-2.

q, k and v may each have fewer heads than g and beta: head h of H reads head h // (H/Hq) of q, and so on. This is the
reference: it runs wherever PyTorch does.
"""

import math

import torch
import torch.nn.functional as F

from .ssd_reference import _check_options, _check_shape, _compute_dtype, _decays, _documents

DEFAULT_CHUNK_SIZE = 32


def delta_scan(q, k, v, g, beta, *, initial_state=None, seq_idx=None, return_final_state=False, chunk_size=None):
    """Run the recurrence over whole sequences, by chunks (arXiv 2412.06464, section 3.3).

    Everything is computed in float32 (float64 if v is float64), under autocast too. Differentiable in every floating
    argument.

    Args:
        q: (B, L, Hq, N) output maps ("queries").
        k: (B, L, Hk, N) input maps ("keys"): of length 1 at most, or the recurrence may grow.
        v: (B, L, Hv, P) inputs ("values"). Hq, Hk and Hv must each divide H.
        g: (B, L, H) logarithms of the decay, at most 0.
        beta: (B, L, H) how much of what is held under a key is replaced, 0 to 1.
        initial_state: (B, H, P, N) state before the first token, or None for zeros.
        seq_idx: (B, L) integers, the document of each token. The state is reset to zero wherever the value changes;
            initial_state belongs to the document of the first token.
        return_final_state: also return the state after the last token.
        chunk_size: the most tokens a chunk may have; None takes 32.

    Returns:
        y (B, L, H, P) in v.dtype; with return_final_state, (y, state), where state (B, H, P, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of heads, L = 0, chunk_size or the type of seq_idx does not fit.
    """
    check_scan(q, k, v, g, beta, initial_state, seq_idx, chunk_size)
    length, heads = g.shape[1:]
    chunks = math.ceil(length / (chunk_size or DEFAULT_CHUNK_SIZE))
    padding = -length % chunks
    with torch.autocast(v.device.type, enabled=False):
        dtype = _compute_dtype(v)

        def by_chunk(t):  # (B, L, heads, ...) -> (B, c, H, Q, ...), zeros after the last token: these change no state
            t = F.pad(t.to(dtype), (0, 0) * (t.dim() - 2) + (0, padding))
            return t.repeat_interleave(heads // t.shape[2], 2).unflatten(1, (chunks, -1)).transpose(2, 3)

        q, k, x, g, beta = (by_chunk(t) for t in (q, k, v, g, beta))
        within, to_end, from_start = _decays(g, _documents(seq_idx, chunks, padding))
        # What a token writes depends on what those before it in the chunk write: a triangular system. Solved for all
        # at once, it gives what they write into an empty state (new), and by which keys they lose of the one entering
        # (lost).
        system = (beta[..., None] * (k @ k.mT) * within).tril(-1)  # the diagonal is taken as ones
        written = beta[..., None] * torch.cat((x, from_start[..., None] * k), -1)
        written = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
        new, lost = written.split((x.shape[-1], k.shape[-1]), -1)
        scores, reads, writes = (q @ k.mT) * within, from_start[..., None] * q, to_end[..., None] * k
        kept = from_start[..., -1, None, None]
        state = new.new_zeros(new.shape[0], heads, x.shape[-1], k.shape[-1])
        state = state if initial_state is None else initial_state.to(dtype)
        ys = []
        for chunk in range(chunks):
            values = new[:, chunk] - lost[:, chunk] @ state.mT
            ys.append(reads[:, chunk] @ state.mT + scores[:, chunk] @ values)
            state = torch.addcmul(values.mT @ writes[:, chunk], kept[:, chunk], state)
        y = torch.stack(ys, 1).transpose(2, 3).flatten(1, 2)[:, :length].to(v.dtype)
    return (y, state) if return_final_state else y


@torch.no_grad()
def delta_step(state, q, k, v, g, beta):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, H, P, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        q: (B, Hq, N); k: (B, Hk, N); v: (B, Hv, P); g, beta: (B, H): as in delta_scan, for one token.

    Returns:
        y (B, H, P) in v.dtype.

    Raises:
        ValueError: a shape or a number of heads does not fit.
    """
    check_step(state, q, k, v, g, beta)
    heads = g.shape[1]
    with torch.autocast(v.device.type, enabled=False):
        dtype = torch.promote_types(_compute_dtype(v), state.dtype)
        q, k, x = (t.to(dtype).repeat_interleave(heads // t.shape[1], 1) for t in (q, k, v))
        old = state * g.to(dtype).exp()[..., None, None]
        change = beta.to(dtype).unsqueeze(-1) * (x - (old @ k.unsqueeze(-1)).squeeze(-1))
        new = torch.addcmul(old, change.unsqueeze(-1), k.unsqueeze(-2))
        state.copy_(new)
        return (new @ q.unsqueeze(-1)).squeeze(-1).to(v.dtype)


def check_scan(q, k, v, g, beta, initial_state, seq_idx, chunk_size):
    """Raise a ValueError if the arguments of delta_scan do not fit together."""
    _check_inputs(q, k, v, g, beta, "B, L")
    batch, length, _ = g.shape
    if batch == 0 or length == 0:
        raise ValueError(f"g: expected at least one token, got {'B' if batch == 0 else 'L'} = 0")
    _check_options(g, initial_state, (v.shape[-1], k.shape[-1]), seq_idx, chunk_size)


def check_step(state, q, k, v, g, beta):
    """Raise a ValueError if the arguments of delta_step do not fit together."""
    _check_inputs(q, k, v, g, beta, "B")
    _check_shape("state", state, "B, H, P, N", (*g.shape, v.shape[-1], k.shape[-1]))


def _check_inputs(q, k, v, g, beta, leading):
    """Check the arguments that all functions share; leading names the dimensions before the heads."""
    dims = len(leading.split(", "))
    if g.dim() != dims + 1:
        raise ValueError(f"g: expected shape ({leading}, H), got {tuple(g.shape)}")
    first, heads = tuple(g.shape[:dims]), g.shape[-1]
    _check_shape("beta", beta, f"{leading}, H", tuple(g.shape))
    for name, t, last in (("q", q, "N"), ("k", k, "N"), ("v", v, "P")):
        if t.dim() != dims + 2 or tuple(t.shape[:dims]) != first:
            raise ValueError(
                f"{name}: expected shape ({leading}, heads, {last}) with ({leading}) = {first}, got {tuple(t.shape)}"
            )
        if t.shape[dims] == 0 or heads % t.shape[dims]:
            raise ValueError(f"{name}: expected a number of heads that divides H = {heads}, got {t.shape[dims]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q: expected the size of keys, N = {k.shape[-1]}, got {q.shape[-1]}")
