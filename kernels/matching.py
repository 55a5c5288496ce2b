"""Matching of mixing matrices: how far a head's attention matrix is from its state-space matrix, never holding either.

    || softmax(q k^T * scale) - M ||_F^2        M[t, s] = C_t . B_s dt_s exp(sum_{j=s+1..t} dt_j A)  (s <= t)

for every head. The first stage of MOHAWK, "matrix orientation" (Bick et al. 2024, arXiv 2408.10189), minimises its
root.
matching_reference.py has the same function in plain PyTorch, matching_triton.py the kernels.
"""

import torch

from . import matching_reference as reference
from .backend import inner_contiguous, use_triton

__all__ = ["mixing_distance"]


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
    backend="auto",
):
    """The squared Frobenius distance between a teacher's causal attention matrix and ssd_matrix, of every head.

    Sums, decays and probabilities are float32 (float64 in the reference if C is float64), under autocast too. The
    kernels multiply q and k in their common dtype, and B and C in theirs, accumulating in float32; the reference does
    in float32. The kernels' distance is right to float32's rounding of the two matrices' norms, not of the distance
    itself; gradients come from the differences of the entries. Differentiable in dt, A, B, C and dt_bias; by the
    kernels once only. q and k are the teacher's: constants, which get no gradient. Memory beside the gradients is
    O(B H L).

    Args:
        q: (B, L, H, P) queries, normed and rotated.
        k: (B, L, K, P) keys, likewise. Query head h reads key head h // (H/K).
        dt: (B, L, H), as in ssd_scan.
        A: (H,), likewise.
        B: (B, L, Hb, N), likewise.
        C: (B, L, Hc, N), likewise.
        scale: of q.k before the softmax, positive; None takes P**-0.5.
        dt_bias: as in ssd_scan.
        dt_softplus: likewise.
        seq_idx: (B, L) integers, the document of each token: a new one begins wherever the value changes. Both matrices
            are zero across documents.
        window: how many last tokens a query attends to, itself included; None is all. It does not cut the state-space
            matrix.
        softcap: scores become softcap * tanh(score / softcap); None leaves them.
        mask: (B, L) bool or 0/1, False where a token is padding: its row and column are zero in both matrices, and its
            dt counts as zero, so that it does not decay the state. None is no padding.
        return_norm: also return the squared Frobenius norm of the attention matrix, which has no gradient: the distance
            over it is the relative one.
        backend: "triton" or "torch"; "auto" takes the kernels wherever they can run.

    Returns:
        (B, H) float32 (float64 if C is float64); with return_norm, a pair of these.

    Raises:
        ValueError: a shape, a number of heads, L = 0, a type, scale, window or softcap does not fit; or backend is
            "triton" and the kernels cannot run.
        RuntimeError: a second derivative through the kernels.
    """
    options = {
        "scale": scale,
        "dt_bias": dt_bias,
        "seq_idx": seq_idx,
        "window": window,
        "softcap": softcap,
        "mask": mask,
    }
    reference.check_distance(q, k, dt, A, B, C, **options)
    unsupported = None
    if q.shape[-1] > 256 or B.shape[-1] > 256:
        unsupported = f"head_dim and state of at most 256, got {q.shape[-1]} and {B.shape[-1]}"
    elif torch.float64 in (q.dtype, k.dtype, B.dtype):
        unsupported = "no float64"
    if not use_triton(backend, C, unsupported):
        return reference.mixing_distance(
            q, k, dt, A, B, C, **options, dt_softplus=dt_softplus, return_norm=return_norm
        )  # fmt: skip
    from . import matching_triton

    q, k = _common(q.detach(), k.detach())
    B, C = _common(B, C)
    A, dt_bias = inner_contiguous(A), inner_contiguous(dt_bias)
    distance, norm, _ = matching_triton.mixing_distance(
        q, k, dt, A, B, C, dt_bias, seq_idx, mask, float(q.shape[-1] ** -0.5 if scale is None else scale), dt_softplus,
        window, None if softcap is None else float(softcap),
    )  # fmt: skip
    return (distance, norm.detach()) if return_norm else distance


def _common(*tensors):
    """The tensors in one dtype, contiguous in the last dimension."""
    dtype = torch.promote_types(*(t.dtype for t in tensors))
    return [inner_contiguous(t.to(dtype)) for t in tensors]
