"""Divergence between a student's next-token distribution and a teacher's that was cached: its k most likely tokens.

Plain PyTorch: the products with the output matrix take most of the time. As in `kl_reference`, logits are made a chunk
of tokens at a time, never held whole, and the gradients are computed in the same pass.
"""

import math

import torch
from torch import Tensor

from .custom_op import CustomOp, once
from .kl_reference import CHUNK_BYTES, _cross_entropy, _matmul, capped, check_options, common_dtype

# In place of log 0: finite, so that 0 log 0 is 0 and not NaN.
_LOG_ZERO = -1e30


def cached_kl(
    hidden,
    weight,
    ids,
    logprobs,
    rest,
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
    """T**2 * divergence(teacher, student) [+ ce_weight * cross-entropy] over k + 1 buckets: k tokens and all others.

    The counterpart of `transpoint.kernels.kl.linear_kl` for a teacher of which, of each token, only the k most likely
    next tokens and the mass of the rest are known. The student's logits are hidden @ weight.T, its distribution is
    p_s = softmax(logits / T), and its buckets are p_s[ids] and 1 - sum(p_s[ids]). Averaged over the tokens that count,

        "forward"  sum_i t_i log(t_i / s_i),  i over the k + 1 buckets

    and "reverse" and "jsd" are as in `linear_kl`, over buckets. By the data-processing inequality (Cover and Thomas,
    Elements of Information Theory, section 2.8: merging outcomes brings distributions no further apart) each is a lower
    bound of the same divergence over the whole vocabulary, and equal to it where k is the vocabulary's size. How the
    student divides the rest among the other tokens is free. Of a teacher whose rest is spread evenly, "forward" lacks
    r KL(even || the student's own division of its rest), with r the mass of the rest.

    Logits are a product in the autocast dtype, or else in the common dtype of hidden and weight; what follows is in
    float32 (float64 if hidden or weight is), sums over chunks included. Differentiable once, in hidden and weight; the
    gradients are computed in the forward pass and kept, but only those of the two that require grad.

    Args:
        hidden: (..., D) the student's last hidden states, after the final norm.
        weight: (V, D) its output matrix, without rows that the teacher's distribution does not have.
        ids: (..., k) integers, the teacher's most likely tokens, each once.
        logprobs: (..., k) their log-probabilities at temperature T, in the whole distribution.
        rest: (...,) log of the mass of the other tokens at temperature T; -inf where there are none.
        divergence: "forward", "reverse" or "jsd".
        beta: the teacher's share of the mixture, for "jsd": 0 < beta < 1.
        temperature: T > 0, of both: what the log-probabilities were cached at.
        mask: bool or 0/1 over the leading dimensions, True where a token counts; None counts all. A masked token counts
            for nothing, its label included, and may hold NaN.
        labels: integers over the leading dimensions, the next token's id or -100 where it does not count; None leaves
            the cross-entropy out. Another label outside 0 ... V - 1 makes the loss NaN.
        ce_weight: factor of the cross-entropy.
        ce_over: what the cross-entropy is a mean over: "labels", the tokens whose label counts, or "tokens", all tokens
            that count (see `linear_kl`).
        softcap: c > 0 where the student's logits are c tanh(z / c) of the product z; None where they are the product.
        chunk_size: tokens handled at a time; None takes as many as fit a fixed number of bytes.
        return_parts: also return the two terms, for a log.

    Returns:
        A scalar in float32 (or float64); zero, with zero gradients, if no token counts. With return_parts, a tuple
        (loss, divergence with its T**2, cross-entropy without its weight): the latter two carry no gradient, and the
        cross-entropy is zero without labels.

    Raises:
        ValueError: a shape, divergence, beta, temperature, ce_over, softcap or chunk_size does not fit.
        RuntimeError: a second derivative is taken.
    """
    tokens = hidden.shape[:-1]
    if weight.dim() != 2 or hidden.dim() == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape (V, D) with the D of hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if ids.dim() == 0 or ids.shape[:-1] != tokens or not 1 <= ids.shape[-1] <= len(weight):
        raise ValueError(
            f"ids: expected shape (*{tuple(tokens)}, k) with k from 1 to {len(weight)}, got {tuple(ids.shape)}"
        )
    for name, tensor, shape in (
        ("logprobs", logprobs, ids.shape),
        ("rest", rest, tokens),
        ("mask", mask, tokens),
        ("labels", labels, tokens),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    for name, tensor in (("ids", ids), ("labels", labels)):
        if tensor is not None and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise ValueError(f"{name}: expected integers, got {tensor.dtype}")
    check_options(divergence, beta, temperature, ce_over, softcap, chunk_size)
    grad = torch.is_grad_enabled()
    loss, parts, *_ = _cached_kl(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids.reshape(-1, ids.shape[-1]),
        logprobs.detach().reshape(-1, ids.shape[-1]),
        rest.detach().reshape(-1),
        None if mask is None else mask.reshape(-1) != 0,
        None if labels is None else labels.reshape(-1),
        common_dtype(hidden, weight),
        divergence,
        beta,
        temperature,
        ce_weight,
        ce_over,
        softcap,
        chunk_size or max(1, CHUNK_BYTES // (4 * len(weight))),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )
    return (loss, *parts.detach().unbind()) if return_parts else loss


def cached_kl_forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    rest: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    product_dtype: torch.dtype,
    divergence: str,
    beta: float,
    temperature: float,
    ce_weight: float,
    ce_over: str,
    softcap: float | None,
    chunk_size: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two parts, its gradients (empty where not asked for) without their common factor, and that factor.

    The arguments of `cached_kl` with tokens in one dimension, a bool mask, and the dtype of the product.
    """
    dtype = _sum_dtype(hidden, weight)
    total, ce = (hidden.new_zeros((), dtype=dtype) for _ in range(2))
    d_hidden = torch.zeros_like(hidden) if hidden_grad else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=dtype) if weight_grad else weight.new_empty(0, dtype=dtype)
    count = total.new_full((), len(hidden)) if mask is None else mask.sum().to(dtype)
    count = count.clamp(min=1)
    if mask is not None and labels is not None:
        labels = labels.masked_fill(~mask, -100)
    if labels is not None:
        ce_count = (labels != -100).sum().clamp(min=1).to(dtype) if ce_over == "labels" else count
        ce_share = ce_weight * count / (ce_count * temperature)  # in units of temperature / count, as d below
    matrix = weight.to(product_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            inputs, keep = hidden[chunk].to(product_dtype), None
            if mask is not None:
                keep = mask[chunk, None]
                inputs = inputs.masked_fill(~keep, 0)  # it may be NaN, which a zero gradient would not stop
            logits, slope = capped(_matmul(inputs, matrix.mT, dtype), softcap)
            value, d = _divergence(
                logits / temperature, ids[chunk], logprobs[chunk], rest[chunk], divergence, beta, keep
            )
            total += value
            if labels is not None:
                chunk_ce, d_ce = _cross_entropy(logits, labels[chunk])
                ce += chunk_ce
                d = d_ce.mul_(ce_share).add_(d)
            if slope is not None:
                d = d * slope
            if hidden_grad or weight_grad:
                d = d.to(product_dtype)
                if hidden_grad:
                    d_hidden[chunk] = _matmul(d, matrix, dtype)
                if weight_grad:
                    d_weight += _matmul(d.mT, inputs, dtype)
    loss = total = total * (temperature**2 / count)
    if labels is not None:
        ce = ce / ce_count
        loss = total + ce_weight * ce
    # The factor is left to the backward pass, after the products and the loss scale: here float16 could underflow.
    return loss, torch.stack([total, ce]), d_hidden, d_weight, temperature / count


def cached_kl_backward(d_loss: Tensor, grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that the forward pass kept, times that of the loss, in the dtype of its input."""
    return (grad * (d_loss * factor)).to(dtype)


def _divergence(logits, ids, logprobs, rest, divergence, beta, keep):
    """The sum over tokens, and its gradient in the logits (which have been divided by the temperature)."""
    ids = ids.long()
    log = torch.log_softmax(logits, -1)
    top = log.gather(1, ids)
    # Not log(1 - sum): a student that is sure of its k tokens has a rest too small for that.
    others = log.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True).clamp_(min=_LOG_ZERO)
    s_log = torch.cat([top, others], 1)
    t_log = torch.cat([logprobs, rest[:, None]], 1).to(log.dtype).clamp_(min=_LOG_ZERO)
    s_prob, t_prob = s_log.exp(), t_log.exp()
    # `d` is the derivative in the log of each of the student's buckets.
    if divergence == "forward":
        value, d = t_prob * (t_log - s_log), -t_prob
    elif divergence == "reverse":
        value = s_prob * (s_log - t_log)
        d = value + s_prob
    else:
        m_log = torch.logaddexp(t_log + math.log(beta), s_log + math.log(1 - beta))
        s_value = s_prob * (s_log - m_log)
        value, d = beta * t_prob * (t_log - m_log) + (1 - beta) * s_value, (1 - beta) * s_value
    if keep is not None:
        value, d, log = value.masked_fill(~keep, 0), d.masked_fill(~keep, 0), log.masked_fill(~keep, 0)
    # A logit raises its own bucket by its share in it, and lowers every bucket by its probability.
    every = d.sum(-1, keepdim=True)
    d_logits = (log - others).exp_().mul_(d[:, -1:]).sub_(log.exp_().mul_(every))
    return value.sum(), d_logits.scatter_(1, ids, d[:, :-1] - s_prob[:, :-1] * every)


def _sum_dtype(hidden, weight):
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def _fake(hidden, weight, *args):
    hidden_grad, weight_grad = args[-2:]
    loss = hidden.new_empty((), dtype=_sum_dtype(hidden, weight))
    return (
        loss,
        loss.new_empty(2),
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        loss.new_empty(weight.shape if weight_grad else 0),
        loss.new_empty(()),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else zeros are made for the kept gradients, as large as the head
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[-2:]


def _backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 17
    *kept, factor = ctx.saved_tensors
    grads = [
        _kept_gradient(d_loss, grad, factor, dtype) if wanted else None
        for grad, dtype, wanted in zip(kept, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *grads, *[None] * 15


_kept_gradient = CustomOp(
    cached_kl_backward, lambda d_loss, grad, factor, dtype: torch.empty_like(grad, dtype=dtype), **once("cached_kl")
)
_cached_kl = CustomOp(cached_kl_forward, _fake, save=_save, gradients=_backward)
