"""Matching of mixing matrices in plain PyTorch: how far a head's attention matrix is from its state-space matrix.

    || softmax(q k^T * scale) - M ||_F^2        M[t, s] = C_t . B_s dt_s exp(sum_{j=s+1..t} dt_j A)  (s <= t)

for every head. The first stage of MOHAWK, "matrix orientation" (Bick et al. 2024, arXiv 2408.10189), minimises its
root.

This is the reference: it runs wherever PyTorch does, and faster kernels are tested against it. It takes a few rows of
the matrices at a time, forward and backward, so it never holds whole ones.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .ssd_reference import _check_inputs, _check_shape, _compute_dtype, _grouped_matmul, _scale_heads, _step_sizes

BLOCK_BYTES = 64 * 2**20  # the most that a few rows of one matrix, of all heads, may take; about ten live at a time
BLOCK_ROWS = 64


def mixing_distance(
    q,
    k,
    dt,
    A,
    B,
    C,
    *,
    scale=None,
    dt_bias=None,
    dt_softplus=True,
    seq_idx=None,
    window=None,
    softcap=None,
    mask=None,
    return_norm=False,
):
    """The squared Frobenius distance between a teacher's causal attention matrix and ssd_matrix, of every head.

    Both are computed in float32 (float64 if C is float64), under autocast too. Differentiable in dt, A, B, C and
    dt_bias. q and k are the teacher's: constants, which get no gradient.

    Args:
        q: (B, L, H, P) queries, normed and rotated.
        k: (B, L, K, P) keys, likewise. Query head h reads key head h // (H/K).
        dt: (B, L, H); A: (H,); B: (B, L, Hb, N); C: (B, L, Hc, N): as in ssd_scan.
        scale: of q.k before the softmax, positive; None takes P**-0.5.
        dt_bias, dt_softplus: as in ssd_scan.
        seq_idx: (B, L) integers, the document of each token: a new one begins wherever the value changes. Both matrices
            are zero across documents.
        window: how many last tokens a query attends to, itself included; None is all. It does not cut the state-space
            matrix.
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        mask: (B, L) bool or 0/1, False where a token is padding: its row and column are zero in both matrices, and its
            dt counts as zero, so that it does not decay the state. None is no padding.
        return_norm: also return the squared Frobenius norm of the attention matrix, which has no gradient: the distance
            over it is the relative one.

    Returns:
        (B, H) float32 (float64 if C is float64); with return_norm, a pair of these.

    Raises:
        ValueError: a shape, a number of heads, L = 0, a type, scale, window or softcap does not fit.
    """
    check_distance(q, k, dt, A, B, C, scale, dt_bias, seq_idx, window, softcap, mask)
    batch, length, heads = dt.shape
    with torch.autocast(C.device.type, enabled=False):
        dtype = _compute_dtype(C)
        step = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        if mask is not None:
            step = step.masked_fill((mask == 0).unsqueeze(-1), 0)
        step = step.mT  # (B, H, L)
        log_decay = step * A.to(dtype)[:, None]
        B, C = (t.to(dtype).transpose(1, 2) for t in (B, C))
        q, k = (t.detach().to(dtype).transpose(1, 2) for t in (q, k))
        if scale is None:
            scale = q.shape[-1] ** -0.5
        rows = BLOCK_BYTES // (batch * heads * length * dtype.itemsize)
        rows = max(1, min(rows, BLOCK_ROWS))
        blocks = []
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            seen, attended = _visible(start, stop, seq_idx, window, mask, q.device)
            arguments = q[:, :, start:stop], k[:, :, :stop], step[..., :stop], log_decay[..., :stop], B[:, :, :stop]
            # Recomputed in the backward pass: otherwise the blocks together would be kept, as large as the matrices.
            blocks.append(
                checkpoint(
                    _rows_distance,
                    *arguments,
                    C[:, :, start:stop],
                    seen,
                    attended,
                    scale,
                    softcap,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        distance, norm = (torch.stack(sums).sum(0) for sums in zip(*blocks, strict=True))
    return (distance, norm) if return_norm else distance


def _rows_distance(q, k, step, log_decay, B, C, seen, attended, scale, softcap):
    """Distance and norm (B, H), of the rows that q and C (B, heads, R, ...) stand for; the others have S >= R columns,
    up to that of the last row."""
    with torch.no_grad():
        scores = _grouped_matmul(q, k.mT) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # The row of a padding token is NaN at first: it has nothing to attend to.
        attention = scores.masked_fill(~attended, -math.inf).softmax(-1).masked_fill(~attended, 0)

    # Sums over j = s+1..t of terms that are all negative, never differences of prefix sums, which lose all accuracy
    # where the sequence is long: from s to the first row, from there to t; inside the block, for every pair.
    size, before = q.shape[-2], step.shape[-1] - q.shape[-2]
    head = log_decay[..., before:]
    tail = F.pad(log_decay[..., 1:before].flip(-1).cumsum(-1).flip(-1), (0, min(before, 1)))
    pairs = head.unsqueeze(-1).expand(*head.shape, size)
    below = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    within = pairs.masked_fill(~below, 0).cumsum(-2)
    exponent = torch.cat([head.cumsum(-1).unsqueeze(-1) + tail.unsqueeze(-2), within], -1)
    decay = exponent.masked_fill(~seen, -math.inf).exp()
    matrix = _scale_heads(_grouped_matmul(C, B.mT), decay * step.unsqueeze(-2))
    return (attention - matrix).square().sum((-2, -1)), attention.square().sum((-2, -1))


def _visible(start, stop, seq_idx, window, mask, device):
    """Which columns below `stop` the rows from `start` have, (B or 1, 1, R, stop): in ssd_matrix, in attention."""
    t, s = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
    seen = (s <= t)[None]
    if seq_idx is not None:
        document = F.pad((seq_idx[:, 1:stop] != seq_idx[:, : stop - 1]).cumsum(1), (1, 0))
        seen = seen & (document[:, start:].unsqueeze(2) == document.unsqueeze(1))
    if mask is not None:
        counts = mask[:, :stop] != 0
        seen = seen & counts[:, start:].unsqueeze(2) & counts.unsqueeze(1)
    attended = seen if window is None else seen & (s > t - window)
    return seen.unsqueeze(1), attended.unsqueeze(1)


def check_distance(q, k, dt, A, B, C, scale, dt_bias, seq_idx, window, softcap, mask):
    """Raise a ValueError if the arguments of mixing_distance do not fit together."""
    _check_inputs(None, dt, A, B, C, None, dt_bias, leading="B, L")
    batch, length, heads = dt.shape
    if batch == 0 or length == 0:
        raise ValueError(f"dt: expected at least one token, got {'B' if batch == 0 else 'L'} = 0")
    if q.dim() != 4 or q.shape[:3] != dt.shape:
        raise ValueError(f"q: expected shape (B, L, H, P) with (B, L, H) = {tuple(dt.shape)}, got {tuple(q.shape)}")
    if k.dim() != 4 or k.shape[:2] != dt.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k: expected shape (B, L, heads, P) with (B, L) = {(batch, length)} and P = {q.shape[3]}, "
            f"got {tuple(k.shape)}"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides H = {heads}, got {k.shape[2]}")
    for name, t in (("seq_idx", seq_idx), ("mask", mask)):
        if t is not None:
            _check_shape(name, t, "B, L", (batch, length))
    if seq_idx is not None and (seq_idx.is_floating_point() or seq_idx.is_complex()):
        raise ValueError(f"seq_idx: expected integers, got {seq_idx.dtype}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive integer, got {window}")
