"""cached_kl against the divergence of buckets written out, and against linear_kl on whole logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transpoint.kernels.kl import linear_kl
from transpoint.kernels.kl_cached import cached_kl

VOCAB = 13


def truncated(teacher_logits, k, temperature=1.0):
    """ids, logprobs and rest of whole logits."""
    log = torch.log_softmax(teacher_logits.detach() / temperature, -1)
    logprobs, ids = log.topk(k, -1)
    rest = log.scatter(-1, ids, -math.inf).logsumexp(-1)
    return ids, logprobs, rest


def make(k, tokens=(2, 5), dtype=torch.float64, temperature=1.0):
    """Hidden states and output matrix of a student, those of a teacher, and what is cached of the teacher."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((*tokens, 4), (VOCAB, 4), (*tokens, 6), (VOCAB, 6))
    )
    cached = truncated(t_hidden @ t_weight.T, k, temperature)
    return (hidden.requires_grad_(), weight.requires_grad_()), (t_hidden, t_weight), cached


def naive(hidden, weight, ids, logprobs, rest, divergence="forward", beta=0.5, temperature=1.0, counts=None):
    p = torch.softmax(hidden @ weight.T / temperature, -1).gather(-1, ids.long())
    s = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    t = torch.cat([logprobs, rest[..., None]], -1).exp()
    m = beta * t + (1 - beta) * s

    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

    value = dict(forward=kl(t, s), reverse=kl(s, t), jsd=beta * kl(t, m) + (1 - beta) * kl(s, m))[divergence]
    return (value if counts is None else value[counts]).mean() * temperature**2


def gradients(loss, student):
    return torch.autograd.grad(loss, student)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, VOCAB - 1])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_value_and_gradients_are_those_of_the_buckets(divergence, temperature, k, chunk_size):
    student, _, cached = make(k, temperature=temperature)
    options = dict(divergence=divergence, beta=0.3, temperature=temperature)
    got, want = cached_kl(*student, *cached, **options, chunk_size=chunk_size), naive(*student, *cached, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients(3 * got, student), gradients(3 * want, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_gradients_are_finite_differences(divergence):
    student, _, cached = make(4)
    assert torch.autograd.gradcheck(lambda h, w: cached_kl(h, w, *cached, divergence=divergence, chunk_size=4), student)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ce_over", [None, "labels", "tokens"])
@pytest.mark.parametrize("masked", [False, True])
def test_with_all_tokens_it_is_linear_kl(divergence, dtype, tolerance, ce_over, masked):
    student, teacher, _ = make(VOCAB, dtype=dtype, temperature=2.0)
    cached = truncated(teacher[0] @ teacher[1].T, VOCAB, 2.0)
    assert cached[2].isinf().all()
    options = dict(divergence=divergence, temperature=2.0, return_parts=True)
    if ce_over:
        labels = torch.arange(10).view(2, 5)
        labels[0, 1:3] = -100
        options.update(labels=labels, ce_weight=0.4, ce_over=ce_over)
    if masked:
        options["mask"] = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0]])
    got, want = cached_kl(*student, *cached, **options), linear_kl(*student, *teacher, **options, backend="torch")
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(got[0], student), gradients(want[0], student), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_it_rises_with_k_to_the_whole_divergence(divergence):
    """Merging outcomes brings distributions no further apart."""
    values = []
    for k in range(1, VOCAB + 1):
        student, teacher, cached = make(k, tokens=(50,))
        values.append(cached_kl(*student, *cached, divergence=divergence).item())
    whole = linear_kl(*student, *teacher, divergence=divergence, backend="torch").item()
    assert all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert values[0] < 0.9 * whole and values[-1] == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("ce_over", ["labels", "tokens"])
def test_masked_tokens_count_for_nothing_and_may_be_nan(ce_over):
    student, _, cached = make(4)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    labels = torch.arange(10).view(2, 5)
    labels[0, 1] = -100
    want = naive(*student, *cached, counts=mask.bool())
    logits = student[0] @ student[1].T
    counts = mask.bool() & (labels != -100)
    ce = torch.nn.functional.cross_entropy(logits[counts], labels[counts], reduction="sum")
    ce = ce / (counts.sum() if ce_over == "labels" else mask.sum())
    expected = gradients(want + 0.5 * ce, student)
    hidden = student[0].detach().clone()
    hidden[mask == 0] = math.nan
    broken = (hidden.requires_grad_(), student[1])
    ids, logprobs, rest = (t.clone() for t in cached)
    logprobs[mask == 0], rest[mask == 0] = math.nan, math.nan
    options = dict(labels=labels, ce_weight=0.5, ce_over=ce_over, chunk_size=3, return_parts=True)
    loss, value, got_ce = cached_kl(*broken, ids, logprobs, rest, mask=mask, **options)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(got_ce, ce.detach())
    for a, b in zip(gradients(loss, broken), expected, strict=True):
        torch.testing.assert_close(a, b)
    nothing, *_ = cached_kl(*broken, ids, logprobs, rest, mask=torch.zeros(2, 5), **options)
    assert nothing == 0 and all(g.eq(0).all() for g in gradients(nothing, broken))


def test_a_sure_student_has_a_finite_loss_in_float32():
    """Its rest is far below what 1 - sum(p) resolves."""
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0]], requires_grad=True)
    ids, logprobs, rest = torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]).log()
    loss = cached_kl(hidden, weight, ids, logprobs, rest)
    torch.testing.assert_close(loss, torch.tensor(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 200 - math.log(2))))
    assert all(g.isfinite().all() for g in gradients(loss, (hidden, weight)))


def test_logits_are_never_held_whole():
    """Nothing is made that is as large as tokens x vocabulary, in the forward or the backward pass."""
    tokens, vocab = 64, 500
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=g, requires_grad=True) for s in ((tokens, 8), (vocab, 8)))
    cached = truncated(torch.randn(tokens, vocab, generator=g), 4)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with Watch():
        cached_kl(hidden, weight, *cached, chunk_size=8).backward()
    assert 8 * vocab <= largest < tokens * vocab / 4


def test_only_gradients_that_are_wanted_are_computed():
    student, _, cached = make(4)
    loss = cached_kl(student[0], student[1].detach(), *cached)
    expected = gradients(naive(*student, *cached), student)
    torch.testing.assert_close(gradients(loss, student[:1])[0], expected[0])
    with torch.no_grad():
        assert not cached_kl(*student, *cached).requires_grad


def test_it_is_computed_in_the_autocast_dtype():
    student, _, cached = make(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cached_kl(*student, *cached)
    rounded = [t.detach().bfloat16().double() for t in student]
    want = naive(*rounded, cached[0], *(t.double() for t in cached[1:]))
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=0)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients(loss, student))


def test_it_compiles_as_one_graph():
    student, _, cached = make(4, dtype=torch.float32)
    want = cached_kl(*student, *cached)
    got = torch.compile(cached_kl, fullgraph=True, backend="aot_eager")(*student, *cached)
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(got, student), gradients(want, student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_it_does_not_wait_for_the_device(masked):
    student, _, cached = make(4, dtype=torch.float32)
    student = [t.detach().cuda().requires_grad_() for t in student]
    cached = [t.cuda() for t in cached]
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda") if masked else None
    labels = torch.arange(10, device="cuda").view(2, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cached_kl(*student, *cached, mask=mask, labels=labels, ce_over="tokens", return_parts=True)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_has_no_second_derivative():
    student, _, cached = make(4)
    (first, _) = torch.autograd.grad(cached_kl(*student, *cached), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cached_kl: differentiable once only"):
        first.sum().backward()


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(weight=torch.zeros(VOCAB, 3)), r"weight: expected shape \(V, D\)"),
        (dict(ids=torch.zeros(2, 5, VOCAB + 1, dtype=torch.long)), "ids: expected shape .* k from 1 to 13"),
        (dict(ids=torch.zeros(2, 5, 4)), "ids: expected integers"),
        (dict(logprobs=torch.zeros(2, 5, 3)), "logprobs: expected shape"),
        (dict(rest=torch.zeros(2, 4)), "rest: expected shape"),
        (dict(mask=torch.zeros(2)), "mask: expected shape"),
        (dict(labels=torch.zeros(2, 5)), "labels: expected integers"),
        (dict(divergence="kl"), "divergence: expected"),
        (dict(divergence="jsd", beta=1), "beta: expected"),
        (dict(temperature=0), "temperature: expected"),
        (dict(ce_over="token"), 'ce_over: expected "labels" or "tokens"'),
        (dict(chunk_size=0), "chunk_size: expected"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, told):
    student, _, (ids, logprobs, rest) = make(4)
    arguments = dict(hidden=student[0], weight=student[1], ids=ids, logprobs=logprobs, rest=rest) | change
    with pytest.raises(ValueError, match=told):
        cached_kl(**arguments)
