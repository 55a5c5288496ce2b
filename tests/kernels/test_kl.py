"""linear_kl against the divergence of whole logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transpoint.kernels.kl import linear_kl


def naive(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    divergence="forward",
    beta=0.5,
    temperature=1.0,
    mask=None,
    labels=None,
    ce_weight=1.0,
    ce_over="labels",
    return_parts=False,
):
    vocab = min(len(student_weight), len(teacher_weight))
    s = torch.log_softmax(student_hidden @ student_weight[:vocab].T / temperature, -1)
    t = torch.log_softmax(teacher_hidden @ teacher_weight[:vocab].T / temperature, -1)
    m = torch.log(beta * t.exp() + (1 - beta) * s.exp())

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    of_tokens = dict(forward=kl(t, s), reverse=kl(s, t), jsd=beta * kl(t, m) + (1 - beta) * kl(s, m))[divergence]
    counts = torch.ones(of_tokens.shape, dtype=torch.bool) if mask is None else mask.bool()
    value = of_tokens[counts].mean() * temperature**2
    ce = torch.zeros((), dtype=value.dtype)
    if labels is not None and (counts & (labels != -100)).any():
        logits = student_hidden @ student_weight.T
        ce = torch.nn.functional.cross_entropy(logits[counts], labels[counts].long(), reduction="sum")
        ce = ce / (counts & (labels != -100) if ce_over == "labels" else counts).sum()
    loss = value + ce_weight * ce
    return (loss, value, ce) if return_parts else loss


def make(tokens=(2, 5), student_vocab=11, teacher_vocab=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = dict(
        student_hidden=(*tokens, 4),
        student_weight=(student_vocab, 4),
        teacher_hidden=(*tokens, 6),
        teacher_weight=(teacher_vocab, 6),
    )
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for k, s in shapes.items()}


def student_gradients(loss, args):
    return torch.autograd.grad(loss, [args["student_hidden"], args["student_weight"]])


def assert_equals_naive(args, rtol=1e-9, atol=1e-12, chunk_size=None, **options):
    got, want = linear_kl(**args, chunk_size=chunk_size, **options), naive(**args, **options)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    for name, g, w in zip(
        ("hidden", "weight"), student_gradients(3 * got, args), student_gradients(3 * want, args), strict=True
    ):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, msg=lambda m, n=name: f"d{n}: {m}")


class Recorder(TorchDispatchMode):
    """Records the name of every operation and the size of the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("chunk_size", [1, 3, 10, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", [(11, 11), (11, 9), (9, 13)])
def test_values_and_gradients(chunk_size, temperature, vocabularies):
    assert_equals_naive(make((2, 5), *vocabularies), chunk_size=chunk_size, temperature=temperature)


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocabularies", [(11, 11), (11, 9), (9, 13)])
@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
@pytest.mark.parametrize("ce_over", ["labels", "tokens"])
def test_divergences_and_cross_entropy(ce_over, divergence, beta, vocabularies, temperature, chunk_size):
    options = dict(divergence=divergence, beta=beta, temperature=temperature, chunk_size=chunk_size)
    args = make((2, 5), *vocabularies)
    assert_equals_naive(args, **options)
    options.update(labels=torch.arange(10).view(2, 5) % vocabularies[0], ce_weight=0.3, ce_over=ce_over)
    options["labels"][0, 1:3] = -100
    assert_equals_naive(args, **options)
    assert_equals_naive(args, **options, mask=torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0]]))
    parts = linear_kl(**args, **options, return_parts=True)
    del options["chunk_size"]
    for got, want in zip(parts, naive(**args, **options, return_parts=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert parts[0].requires_grad and not parts[1].requires_grad and not parts[2].requires_grad


@pytest.mark.parametrize("ce_over", ["labels", "tokens"])
def test_labels_that_do_not_count(ce_over):
    args = make()
    want = linear_kl(**args)
    ignored = torch.full((2, 5), -100)
    loss, divergence, cross_entropy = linear_kl(**args, labels=ignored, ce_over=ce_over, return_parts=True)
    assert loss == divergence == want and cross_entropy == 0
    for g, w in zip(student_gradients(loss, args), student_gradients(want, args), strict=True):
        torch.testing.assert_close(g, w)
    for wrong in (-1, 11, 10**6):
        assert linear_kl(**args, labels=ignored.clone().fill_(wrong), ce_over=ce_over).isnan()


def test_jsd_is_symmetric_and_bounded():
    args = make()
    swapped = {
        k.replace("student", "x").replace("teacher", "student").replace("x", "teacher"): v for k, v in args.items()
    }
    for beta in (0.1, 0.5, 0.8):
        value = linear_kl(**args, divergence="jsd", beta=beta)
        torch.testing.assert_close(value, linear_kl(**swapped, divergence="jsd", beta=1 - beta))
        assert 0 < value < -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))


@pytest.mark.parametrize("tokens", [(), (1,), (7,), (2, 3, 2)])
def test_any_leading_dimensions(tokens):
    assert_equals_naive(make(tokens), chunk_size=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_mask(dtype, chunk_size):
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0]]).to(dtype)
    assert_equals_naive(make(), chunk_size=chunk_size, temperature=2.0, mask=mask)


def test_masked_tokens_may_hold_nan():
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    args = make()
    want = linear_kl(**args, mask=mask)
    want_grads = student_gradients(want, args)
    with torch.no_grad():
        args["student_hidden"][~mask] = math.nan
        args["teacher_hidden"][~mask] = math.nan
    got = linear_kl(**args, mask=mask)
    torch.testing.assert_close(got, want)
    for g, w in zip(student_gradients(got, args), want_grads, strict=True):
        torch.testing.assert_close(g, w)


def test_all_tokens_masked():
    args = make()
    loss = linear_kl(**args, mask=torch.zeros(2, 5))
    assert loss == 0
    for name, g in zip(("student_hidden", "student_weight"), student_gradients(loss, args), strict=True):
        assert g.shape == args[name].shape and (g == 0).all()


def test_equal_models_have_no_divergence():
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    assert abs(linear_kl(hidden, weight, hidden, weight)) < 1e-12
    assert linear_kl(hidden, weight, hidden, -weight) > 0.1


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_extreme_logits_stay_finite(divergence):
    args = {k: v.detach() * 200 for k, v in make(dtype=torch.float32).items()}
    args["student_hidden"].requires_grad_()
    args["student_weight"].requires_grad_()
    loss = linear_kl(**args, divergence=divergence)
    assert loss.isfinite() and (0.3 < loss <= math.log(2) if divergence == "jsd" else loss > 1000)
    assert all(g.isfinite().all() for g in student_gradients(loss, args))


def test_teacher_gets_no_gradient():
    args = make()
    linear_kl(**args).backward()
    assert args["teacher_hidden"].grad is None and args["teacher_weight"].grad is None
    assert args["student_hidden"].grad is not None and args["student_weight"].grad is not None


def test_whole_logits_are_never_in_memory():
    args = make((4, 16), student_vocab=50, teacher_vocab=53)
    whole = 64 * 50
    with Recorder() as naive_record:
        naive(**args).backward()
    assert naive_record.largest >= whole
    with Recorder() as record:
        linear_kl(**args, chunk_size=8).backward()
    assert record.largest == 8 * 50  # one chunk of logits; more than either matrix and the hidden states


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "products"), [(True, True, 4), (True, False, 3), (False, True, 3), (False, False, 2)]
)
def test_gradients_that_nobody_needs_are_not_computed(hidden_grad, weight_grad, products):
    args = make()
    args["student_hidden"].requires_grad_(hidden_grad)
    args["student_weight"].requires_grad_(weight_grad)
    with Recorder() as record:
        loss = linear_kl(**args, chunk_size=5)
    assert record.names.count("mm") == products * 2  # two chunks
    assert loss.requires_grad == (hidden_grad or weight_grad)
    if loss.requires_grad:
        loss.backward()
    for name, needed in (("student_hidden", hidden_grad), ("student_weight", weight_grad)):
        want = make()
        assert (args[name].grad is not None) == needed
        if needed:
            (grad,) = torch.autograd.grad(naive(**want), want[name])
            torch.testing.assert_close(args[name].grad, grad)


def test_no_grad_skips_gradient_work():
    with torch.no_grad(), Recorder() as record:
        loss = linear_kl(**make(), chunk_size=5)
    assert record.names.count("mm") == 4 and not loss.requires_grad
    torch.testing.assert_close(loss, naive(**make()).detach())


def test_a_second_backward_of_a_retained_graph_gives_the_same():
    args = make()
    loss = linear_kl(**args)
    first = torch.autograd.grad(loss, [args["student_hidden"], args["student_weight"]], retain_graph=True)
    for g, w in zip(student_gradients(loss, args), first, strict=True):
        assert torch.equal(g, w)


def test_differentiating_twice_is_an_error():
    args = make()
    with pytest.raises(RuntimeError, match="linear_kl: differentiable once only"):
        torch.autograd.grad(linear_kl(**args), args["student_hidden"], create_graph=True)


def test_autocast_and_mixed_dtypes():
    args = make((2, 40), dtype=torch.float32)
    exact = naive(**args)
    exact_grads = student_gradients(exact, args)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kl(**args, chunk_size=7)
    assert loss.dtype == torch.float32
    rounded = {k: v.detach().bfloat16() for k, v in args.items()}
    # The product really ran in bfloat16: the same as with bfloat16 inputs.
    assert torch.equal(loss.detach(), linear_kl(**rounded, chunk_size=7))
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for g, w in zip(student_gradients(loss, args), exact_grads, strict=True):
        assert g.dtype == torch.float32
        assert (g - w).norm() < 0.02 * w.norm()

    # Without autocast: a bfloat16 hidden state meets a float32 matrix in float32; each gradient in its own dtype.
    args["student_hidden"] = args["student_hidden"].detach().bfloat16().requires_grad_()
    loss = linear_kl(**args, chunk_size=7)
    want = {**args, "student_hidden": args["student_hidden"].detach().float().requires_grad_()}
    torch.testing.assert_close(loss, naive(**want))
    got_grads, want_grads = student_gradients(loss, args), student_gradients(naive(**want), want)
    assert [g.dtype for g in got_grads] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(got_grads[0].float(), want_grads[0], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(got_grads[1], want_grads[1], rtol=1e-4, atol=1e-6)


def test_weight_gradient_of_half_precision_is_summed_in_float32():
    # 600 equal tokens, one by one: a bfloat16 running sum would stall when a token's share is 1/256 of it.
    args = {k: v.detach().bfloat16() for k, v in make((1,)).items()}
    many = {k: v.expand(600, -1) if "hidden" in k else v for k, v in args.items()}
    weight = args["student_weight"].requires_grad_()
    (once,) = torch.autograd.grad(linear_kl(**args), weight)
    (grad,) = torch.autograd.grad(linear_kl(**many, chunk_size=1), weight)
    torch.testing.assert_close(grad, once, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(student_weight=torch.zeros(11, 5)), r"^student_weight: expected shape \(V, D\) with the D of"),
        (dict(teacher_weight=torch.zeros(11)), r"^teacher_weight: expected shape \(V, D\) with the D of"),
        (
            dict(teacher_hidden=torch.zeros(2, 4, 6)),
            r"^teacher_hidden: expected shape \(\*\(2, 5\), D_t\), got \(2, 4, 6\)",
        ),
        (dict(labels=torch.zeros(5, dtype=torch.long)), r"^labels: expected shape \(2, 5\), got \(5,\)$"),
        (dict(labels=torch.zeros(2, 5)), r"^labels: expected integers, got torch.float32$"),
        (dict(divergence="kl"), r'^divergence: expected "forward", "reverse" or "jsd", got \'kl\'$'),
        (dict(divergence="jsd", beta=1.0), r"^beta: expected a number between 0 and 1, got 1.0$"),
        (dict(ce_over="token"), r'^ce_over: expected "labels" or "tokens", got \'token\'$'),
        (dict(backend="cuda"), r'^backend: expected "auto", "triton" or "torch", got \'cuda\'$'),
        (dict(mask=torch.ones(5)), r"^mask: expected shape \(2, 5\), got \(5,\)$"),
        (dict(temperature=0.0), r"^temperature: expected a positive number, got 0.0$"),
        (dict(chunk_size=0), r"^chunk_size: expected a positive integer, got 0$"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**make(), **change})
