"""The gated delta rule (gated DeltaNet): the scan over whole sequences, and one decoding step.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T        y_t = S_t q_t

(Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, equation 10.) q, k and v may each have fewer heads than g and beta:
head h of H reads head h // (H/Hq) of q, and so on. delta_reference.py has the same functions in plain PyTorch,
delta_triton.py the kernels.
"""

import torch

from . import delta_reference as reference
from .backend import inner_contiguous, use_triton

__all__ = ["delta_scan", "delta_step"]


def delta_scan(
    q,
    k,
    v,
    g,
    beta,
    *,
    initial_state=None,
    seq_idx=None,
    return_final_state=False,
    chunk_size=None,
    backend="auto",
):
    """Run the recurrence over whole sequences, by chunks (arXiv 2412.06464, section 3.3).

    States, decays and sums are float32 (float64 if v is float64), under autocast too. The kernels multiply matrices in
    the common dtype of q, k and v, accumulating in float32; the reference does in float32. Differentiable in every
    floating argument; the kernels once only.

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
        chunk_size: the most tokens a chunk may have; None leaves it to the implementation. The kernels take 16
            or 32.
        backend: "triton" or "torch"; "auto" takes the kernels wherever they can run.

    Returns:
        y (B, L, H, P) in v.dtype; with return_final_state, (y, state), where state (B, H, P, N) is float32 (float64).

    Raises:
        ValueError: a shape, a number of heads, L = 0, chunk_size or the type of seq_idx does not fit; or backend is
            "triton" and the kernels cannot run.
        RuntimeError: a second derivative through the kernels.
    """
    options = {"initial_state": initial_state, "seq_idx": seq_idx, "chunk_size": chunk_size}
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    unsupported = None
    if dtype == torch.float64:
        unsupported = "the kernels take no float64 keys or queries"
    elif k.shape[-1] > (128 if dtype == torch.float32 else 256):
        unsupported = f"the kernels take keys of at most 256, or 128 in float32, got {k.shape[-1]}"
    if not use_triton(backend, v, unsupported):
        return reference.delta_scan(q, k, v, g, beta, **options, return_final_state=return_final_state)
    reference.check_scan(q, k, v, g, beta, **options)
    from . import delta_triton

    q, k, v_ = (inner_contiguous(t.to(dtype)) for t in (q, k, v))
    initial_state = None if initial_state is None else initial_state.contiguous()
    tensors = [q, k, v, g, beta, initial_state]
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state, *_ = delta_triton.delta_scan(
        q, k, v_, g, beta, initial_state, seq_idx, return_final_state, chunk_size, training
    )
    y = y.to(v.dtype)
    return (y, state) if return_final_state else y


@torch.no_grad()
def delta_step(state, q, k, v, g, beta, *, backend="auto"):
    """Advance the recurrence by one token, for decoding. Not differentiable.

    Args:
        state: (B, H, P, N) float32 (or bfloat16, which rounds the state at every token), updated in place.
        q: (B, Hq, N); k: (B, Hk, N); v: (B, Hv, P); g, beta: (B, H); backend: as in delta_scan, for one token.

    Returns:
        y (B, H, P) in v.dtype.

    Raises:
        ValueError: a shape or a number of heads does not fit; or backend is "triton" and the kernel cannot run.
    """
    unsupported = None
    if state.stride(-1) != 1 or state.dtype == torch.float64:
        unsupported = "the kernel takes a state that is contiguous along N, and not float64"
    if not use_triton(backend, v, unsupported):
        return reference.delta_step(state, q, k, v, g, beta)
    reference.check_step(state, q, k, v, g, beta)
    from .delta_step_triton import delta_step as step

    return step(state, *(inner_contiguous(t) for t in (q, k, v)), g, beta)
