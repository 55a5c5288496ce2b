"""Divergence between a student's and a teacher's next-token distributions, from their hidden states: plain PyTorch.

The logits of a batch (tokens x vocabulary) are the largest tensor of a distillation step, so they are never held: a
few tokens at a time go through both output matrices, and the gradients are computed in the same pass.
"""

import math

import torch

CHUNK_BYTES = 64 * 2**20  # the float32 logits of one chunk and one model; up to four such matrices live at a time
DIVERGENCES = ("forward", "reverse", "jsd")
CE_OVER = ("labels", "tokens")
IGNORED_LABEL = -100


def linear_kl(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    divergence="forward",
    beta=0.5,
    temperature=1.0,
    mask=None,
    labels=None,
    ce_weight=1.0,
    ce_over="labels",
    softcap=None,
    chunk_size=None,
    return_parts=False,
):
    """The same as `transpoint.kernels.kl.linear_kl` (which describes it), without `backend`."""
    check_arguments(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        mask=mask,
        labels=labels,
        ce_over=ce_over,
        softcap=softcap,
        chunk_size=chunk_size,
    )
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (4 * max(len(student_weight), len(teacher_weight))))
    student_hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    labels = None if labels is None else labels.flatten()
    if mask is not None:
        # Drop masked tokens rather than weigh them by zero: it saves their work, and padding may hold NaN.
        kept = mask.flatten().nonzero().squeeze(1)
        student_hidden, teacher_hidden = student_hidden[kept], teacher_hidden[kept]
        labels = None if labels is None else labels[kept]
    grad = torch.is_grad_enabled()
    loss, parts = _LinearKL.apply(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight.detach(),
        labels,
        divergence,
        beta,
        temperature,
        ce_weight,
        ce_over,
        softcap,
        chunk_size,
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
    )
    return (loss, *parts) if return_parts else loss


def check_arguments(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    *,
    divergence,
    beta,
    temperature,
    mask,
    labels,
    ce_over,
    softcap,
    chunk_size,
):
    """Raise ValueError, naming the argument, if a shape or a value does not fit."""
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
    for name, tensor in (("mask", mask), ("labels", labels)):
        if tensor is not None and tensor.shape != tokens:
            raise ValueError(f"{name}: expected shape {tuple(tokens)}, got {tuple(tensor.shape)}")
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise ValueError(f"labels: expected integers, got {labels.dtype}")
    check_options(divergence, beta, temperature, ce_over, softcap, chunk_size)


def check_options(divergence, beta, temperature, ce_over, softcap, chunk_size):
    """Raise ValueError, naming the argument, if a value does not fit."""
    if divergence not in DIVERGENCES:
        raise ValueError(f'divergence: expected "forward", "reverse" or "jsd", got {divergence!r}')
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta: expected a number between 0 and 1, got {beta}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if ce_over not in CE_OVER:
        raise ValueError(f'ce_over: expected "labels" or "tokens", got {ce_over!r}')
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive integer, got {chunk_size}")


def common_dtype(hidden, weight):
    """What a product of the two is computed in: as torch.autocast would, but never down from float64."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype


class _LinearKL(torch.autograd.Function):
    """Mean loss over (M, D) hidden states; computes the gradients that are asked for in its forward pass."""

    @staticmethod
    def forward(
        ctx,
        s_hidden,
        s_weight,
        t_hidden,
        t_weight,
        labels,
        divergence,
        beta,
        temperature,
        ce_weight,
        ce_over,
        softcap,
        chunk_size,
        hidden_grad,
        weight_grad,
    ):
        vocab = min(len(s_weight), len(t_weight))
        rows = len(s_weight) if labels is not None else vocab  # of s_weight; cross-entropy is of the whole vocabulary
        inputs = (s_hidden, s_weight, t_hidden, t_weight)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
        total, ce = (s_hidden.new_zeros((), dtype=dtype) for _ in range(2))
        d_hidden = torch.zeros_like(s_hidden) if hidden_grad else None
        d_weight = torch.zeros_like(s_weight, dtype=dtype) if weight_grad else None
        count = max(1, len(s_hidden))
        if labels is not None:
            ce_count = (labels != IGNORED_LABEL).sum().clamp(min=1).to(dtype) if ce_over == "labels" else count
            ce_share = ce_weight * count / (ce_count * temperature)  # in units of temperature / count: see below
        s_dtype, t_dtype = common_dtype(s_hidden, s_weight), common_dtype(t_hidden, t_weight)
        s_hidden, s_weight = s_hidden.to(s_dtype), s_weight[:rows].to(s_dtype)
        t_hidden, t_weight = t_hidden.to(t_dtype), t_weight[:vocab].to(t_dtype)

        with torch.autocast(s_hidden.device.type, enabled=False):
            for start in range(0, len(s_hidden), chunk_size):
                chunk = slice(start, start + chunk_size)
                s_logits, slope = capped(_matmul(s_hidden[chunk], s_weight.mT, dtype), softcap)
                t_logits, _ = capped(_matmul(t_hidden[chunk], t_weight.mT, dtype), softcap)
                chunk_total, d = _divergence(s_logits[:, :vocab], t_logits, divergence, beta, temperature)
                total += chunk_total
                if labels is not None:
                    chunk_ce, d_ce = _cross_entropy(s_logits, labels[chunk])
                    ce += chunk_ce
                    d_ce *= ce_share
                    d_ce[:, :vocab] += d
                    d = d_ce
                if slope is not None:
                    d = d * slope[:, : d.shape[1]]
                if hidden_grad or weight_grad:
                    # The gradient is T / count times d; that factor is left to the backward pass, after the products
                    # and the loss scale: here it could underflow in float16.
                    d = d.to(s_hidden.dtype)
                    if hidden_grad:
                        d_hidden[chunk] = _matmul(d, s_weight, dtype)
                    if weight_grad:
                        d_weight[:rows] += _matmul(d.mT, s_hidden[chunk], dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.scale, ctx.weight_dtype = temperature / count, inputs[1].dtype
        loss = total = total * (temperature**2 / count)
        if labels is not None:
            ce = ce / ce_count
            loss = total + ce_weight * ce
        parts = torch.stack([total, ce])
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, d_loss, _):
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
        return d_hidden, d_weight, *[None] * 12


def capped(logits, softcap):
    """softcap * tanh(logits / softcap), and its derivative; the logits as they are, and None, without a cap."""
    if softcap is None:
        return logits, None
    ratio = torch.tanh(logits / softcap)
    return softcap * ratio, 1 - ratio**2


def _divergence(s_logits, t_logits, divergence, beta, temperature):
    """The sum over tokens, and its gradient in s_logits / temperature."""
    s_log = torch.log_softmax(s_logits / temperature, -1)
    t_log = torch.log_softmax(t_logits.div_(temperature), -1)
    s_prob, t_prob = s_log.exp(), t_log.exp()
    if divergence == "forward":
        return t_log.sub_(s_log).mul_(t_prob).sum(), s_prob.sub_(t_prob)
    if divergence == "reverse":
        ratio = s_log.sub_(t_log)
        value = (s_prob * ratio).sum(-1, keepdim=True)
        return value.sum(), s_prob.mul_(ratio.sub_(value))
    m_log = torch.logaddexp(t_log + math.log(beta), s_log + math.log(1 - beta))
    t_value = t_log.sub_(m_log).mul_(t_prob).sum()
    ratio = s_log.sub_(m_log)
    s_value = (s_prob * ratio).sum(-1, keepdim=True)
    # d m = (1 - beta) d p_s: its terms add up to a constant, which the softmax's gradient drops.
    return beta * t_value + (1 - beta) * s_value.sum(), s_prob.mul_(ratio.sub_(s_value)).mul_(1 - beta)


def _cross_entropy(logits, labels):
    """The sum over tokens whose label counts, and its gradient in the logits; NaN for a label out of range."""
    log = torch.log_softmax(logits, -1)
    counts = labels != IGNORED_LABEL
    outside = counts & ((labels < 0) | (labels >= logits.shape[1]))
    index = labels.clamp(0, logits.shape[1] - 1).long()[:, None]
    value = torch.where(outside, math.nan, -log.gather(1, index).squeeze(1))
    d = log.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log.dtype))
    return torch.where(counts, value, 0).sum(), d.mul_(counts[:, None])


def _matmul(a, b, dtype):
    """a @ b in float32 (or float64); CUDA keeps the float32 sum of half-precision operands, others round it once."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    return (a @ b).to(dtype)
