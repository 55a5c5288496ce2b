"""KL divergence between a student's and a teacher's next-token distributions, straight from their hidden states.

The logits of a batch (tokens x vocabulary) are the largest tensor of a distillation step, so they are never held: a
few tokens at a time go through both output matrices, and the gradients are computed in the same pass.
"""

import torch

CHUNK_BYTES = 64 * 2**20  # the float32 logits of one chunk and one model; up to four such matrices live at a time


def linear_kl(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    temperature=1.0,
    mask=None,
    chunk_size=None,
):
    """Forward KL(teacher || student) of softmax(hidden @ weight.T / T), times T**2, mean over unmasked tokens.

    The factor T**2 keeps the gradient's magnitude roughly the same for every temperature (Hinton et al. 2015, arXiv
    1503.02531, section 2). Logits are a product in the autocast dtype, or else in the common dtype of hidden and
    weight; all that follows is in float32 (float64 if an input is float64), sums over chunks included.

    Differentiable once, in student_hidden and student_weight; the teacher gets no gradient. The gradients are computed
    in the forward pass and kept: a tensor like student_hidden, and one like student_weight in float32, but only for
    those of the two that require grad.

    Args:
        student_hidden: (..., D_s) last hidden states, after the final norm.
        student_weight: (V_s, D_s) output matrix.
        teacher_hidden: (..., D_t), with the same leading dimensions as student_hidden.
        teacher_weight: (V_t, D_t). If the vocabularies are padded differently, the first min(V_s, V_t) rows of both
            count and the others are left out of the softmax.
        temperature: T > 0.
        mask: bool or 0/1 over the leading dimensions, True where a token counts; None counts all.
        chunk_size: tokens handled at a time; None takes as many as have CHUNK_BYTES of float32 logits.

    Returns:
        A scalar in float32 (or float64); zero, with zero gradients, if no token counts.

    Raises:
        ValueError: a shape, temperature or chunk_size does not fit.
        RuntimeError: in a backward pass with create_graph=True.
    """
    for side, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{side}_weight: expected shape (V, D) with the D of {side}_hidden {tuple(hidden.shape)}, "
                f"got {tuple(weight.shape)}"
            )
    tokens = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != tokens:
        raise ValueError(f"teacher_hidden: expected shape (*{tuple(tokens)}, D_t), got {tuple(teacher_hidden.shape)}")
    if mask is not None and mask.shape != tokens:
        raise ValueError(f"mask: expected shape {tuple(tokens)}, got {tuple(mask.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (4 * min(student_weight.shape[0], teacher_weight.shape[0])))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive integer, got {chunk_size}")

    student_hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    if mask is not None:
        # Drop masked tokens rather than weigh them by zero: it saves their work, and padding may hold NaN.
        kept = mask.flatten().nonzero().squeeze(1)
        student_hidden, teacher_hidden = student_hidden[kept], teacher_hidden[kept]
    grad = torch.is_grad_enabled()
    return _LinearKL.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight.detach(),
        temperature,
        chunk_size,
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
    )


class _LinearKL(torch.autograd.Function):
    """Mean KL over (M, D) hidden states; computes the gradients that are asked for in its forward pass."""

    @staticmethod
    def forward(ctx, s_hidden, s_weight, t_hidden, t_weight, temperature, chunk_size, hidden_grad, weight_grad):
        vocab = min(len(s_weight), len(t_weight))
        inputs = (s_hidden, s_weight, t_hidden, t_weight)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
        total = s_hidden.new_zeros((), dtype=dtype)
        d_hidden = torch.zeros_like(s_hidden) if hidden_grad else None
        d_weight = torch.zeros_like(s_weight, dtype=dtype) if weight_grad else None
        count = max(1, len(s_hidden))
        s_hidden, s_weight = _common_dtype(s_hidden, s_weight[:vocab])
        t_hidden, t_weight = _common_dtype(t_hidden, t_weight[:vocab])

        with torch.autocast(s_hidden.device.type, enabled=False):
            for start in range(0, len(s_hidden), chunk_size):
                chunk = slice(start, start + chunk_size)
                s_log = torch.log_softmax(_matmul(s_hidden[chunk], s_weight.mT, dtype).div_(temperature), -1)
                t_log = torch.log_softmax(_matmul(t_hidden[chunk], t_weight.mT, dtype).div_(temperature), -1)
                t_prob = t_log.exp()
                total += t_log.sub_(s_log).mul_(t_prob).sum()
                if hidden_grad or weight_grad:
                    # The gradient is T (p_s - p_t) / count; the factor T / count is left to the backward pass, after
                    # the products and the loss scale: here it could underflow in float16.
                    d_logits = s_log.exp_().sub_(t_prob).to(s_hidden.dtype)
                    if hidden_grad:
                        d_hidden[chunk] = _matmul(d_logits, s_weight, dtype)
                    if weight_grad:
                        d_weight[:vocab] += _matmul(d_logits.mT, s_hidden[chunk], dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale, ctx.weight_dtype = temperature / count, inputs[1].dtype
        return total * (temperature**2 / count)

    @staticmethod
    def backward(ctx, d_loss):
        # once_differentiable would not do: it raises only if d_loss requires grad, and else drops the second derivative
        # without a word. Grad mode is on in here when the caller asked for create_graph.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_kl: differentiable once only, so not with create_graph=True")
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss * ctx.scale
        if d_hidden is not None:
            d_hidden = d_hidden * scale
        if d_weight is not None:
            d_weight = (d_weight * scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None, None


def _common_dtype(hidden, weight):
    """Cast both as torch.autocast would: to its dtype where it is on, but never down from float64."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _matmul(a, b, dtype):
    """a @ b in float32 (or float64); CUDA keeps the float32 sum of half-precision operands, others round it once."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    return (a @ b).to(dtype)
