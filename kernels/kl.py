"""Divergence between a student's and a teacher's next-token distributions, straight from their hidden states."""

import torch

from . import kl_reference
from .backend import use_triton
from .kl_reference import check_arguments, common_dtype


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
    backend="auto",
):
    """T**2 * divergence(softmax(teacher logits / T), softmax(student logits / T)) [+ ce_weight * cross-entropy].

    Logits are hidden @ weight.T; they are made a chunk of tokens at a time and never held whole. With p_t and p_s the
    two distributions of a token, the divergence is, averaged over the tokens that count,

        "forward"  KL(p_t || p_s)
        "reverse"  KL(p_s || p_t)
        "jsd"      beta KL(p_t || m) + (1 - beta) KL(p_s || m),  m = beta p_t + (1 - beta) p_s

    (the generalised Jensen-Shannon divergence of Agarwal et al. 2023, arXiv 2306.13649, section 2). The factor T**2
    keeps the gradient's magnitude roughly the same for every temperature (Hinton et al. 2015, arXiv 1503.02531,
    section 2). The cross-entropy is -log softmax(student logits)[label], at temperature 1 and over the student's whole
    vocabulary, averaged over what `ce_over` says.

    Logits are a product in the autocast dtype, or else in the common dtype of hidden and weight; all that follows is in
    float32 (float64 if an input is float64), sums over chunks included.

    Differentiable once, in student_hidden and student_weight; the teacher gets no gradient. The gradients are computed
    in the forward pass and kept, but only those of the two that require grad: a frozen head costs no product. Kept are
    a tensor like student_hidden and one like student_weight (the latter in float32, except that the Triton kernels
    round both once, to bfloat16, where the input is bfloat16).

    Args:
        student_hidden: (..., D_s) last hidden states, after the final norm.
        student_weight: (V_s, D_s) output matrix.
        teacher_hidden: (..., D_t), with the same leading dimensions as student_hidden.
        teacher_weight: (V_t, D_t). If the vocabularies are padded differently, the first min(V_s, V_t) rows of both
            count for the divergence and the others are left out of its softmax.
        divergence: "forward", "reverse" or "jsd".
        beta: the teacher's share of the mixture, for "jsd": 0 < beta < 1.
        temperature: T > 0.
        mask: bool or 0/1 over the leading dimensions, True where a token counts; None counts all. A masked token counts
            for nothing, its label included, and may hold NaN.
        labels: integers over the leading dimensions, the next token's id or -100 where it does not count; None leaves
            the cross-entropy out. Another label outside 0 ... V_s - 1 makes the loss NaN.
        ce_weight: factor of the cross-entropy.
        ce_over: what the cross-entropy is a mean over: "labels", the tokens whose label counts, or "tokens", all tokens
            that count, as the divergence is. With "tokens" it is a sum over a number that does not depend on how many
            labels count, so that gradients of micro-batches with as many tokens add up.
        softcap: c > 0 where both models' logits are c tanh(z / c) of the products z (Gemma 2, arXiv 2408.00118,
            section 2); None where they are the products.
        chunk_size: tokens handled at a time; None takes as many as fit a fixed number of bytes.
        return_parts: also return the two terms, for a log.
        backend: "auto" | "triton" | "torch"; auto takes the Triton kernels on NVIDIA GPUs. They need D_s and D_t to be
            multiples of 16 bytes, and no softcap.

    Returns:
        A scalar in float32 (or float64); zero, with zero gradients, if no token counts. With return_parts, a tuple
        (loss, divergence with its T**2, cross-entropy without its weight): the latter two carry no gradient, and the
        cross-entropy is zero without labels.

    Raises:
        ValueError: a shape, divergence, beta, temperature, ce_over, softcap, chunk_size or backend does not fit.
        RuntimeError: in a backward pass with create_graph=True.
    """
    options = dict(divergence=divergence, beta=beta, temperature=temperature, mask=mask, labels=labels)
    options.update(ce_over=ce_over, softcap=softcap, chunk_size=chunk_size)
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    check_arguments(*tensors, **options)
    options.update(ce_weight=ce_weight)
    dtypes = common_dtype(student_hidden, student_weight), common_dtype(teacher_hidden, teacher_weight)
    if not use_triton(backend, student_hidden, _unsupported(tensors, dtypes, softcap)):
        return kl_reference.linear_kl(*tensors, **options, return_parts=return_parts)

    from .kl_triton import linear_kl as op

    grad = torch.is_grad_enabled()
    loss, parts, _, _ = op(
        student_hidden.flatten(0, -2) if student_hidden.dim() > 1 else student_hidden[None],
        student_weight,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        None if mask is None else mask.flatten() != 0,
        None if labels is None else labels.flatten(),
        *dtypes,
        divergence,
        beta,
        temperature,
        ce_weight,
        ce_over,
        chunk_size or 0,
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
    )
    return (loss, *parts.detach().unbind()) if return_parts else loss


def _unsupported(tensors, dtypes, softcap):
    """Why the Triton kernels cannot take these tensors, or None."""
    if softcap is not None:
        return "the kernels know no softcap"
    for dtype, hidden in zip(dtypes, tensors[::2], strict=True):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernels compute in float16, bfloat16 and float32, not {dtype}"
        if hidden.shape[-1] * dtype.itemsize % 16:
            return f"the kernels need hidden sizes that are multiples of 16 bytes, got {hidden.shape[-1]} in {dtype}"
    if any(t.device != tensors[0].device for t in tensors):
        return "the tensors are on different devices"
    return None
