"""The Triton kernels of linear_kl against the reference in float64."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import kl_reference as reference
from transpoint.kernels.kl import linear_kl

pytest.importorskip("triton")
from transpoint.kernels import kl_triton  # noqa: E402

GPU = torch.cuda.is_available()
NAMES = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
# Of ||got - want|| / ||want||. 16-bit values of a few tokens and words do not average out (real shapes: see below), and
# Triton's interpreter rounds them down.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU  # the interpreter multiplies bfloat16 wrongly


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small problems have several tiles and parts, in the interpreter."""
    if not GPU:
        default = kl_triton.default_config
        small = dict(tile=(16, 32, 16), group=2, part=4)
        monkeypatch.setattr(kl_triton, "default_config", lambda *a: {**default(*a), **small})


def assert_near(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    distance = torch.linalg.vector_norm(got.double() - want)
    # What is added is what rounding comes to, in float32, in sums of numbers near 1 that cancel.
    scale = torch.linalg.vector_norm(want) + 1e-3 * want.numel() ** 0.5
    assert distance <= tolerance * scale, f"{name}: relative error {distance / scale:.1e}"  # also false for NaN


def make(device, tokens=(2, 3), vocab=(40, 40), dims=(16, 24), dtype=torch.float32, spread=3.0, frozen=False):
    """Random arguments; logits have a standard deviation of `spread`."""
    g = torch.Generator(device).manual_seed(0)
    shapes = (*tokens, dims[0]), (vocab[0], dims[0]), (*tokens, dims[1]), (vocab[1], dims[1])
    args = {n: torch.randn(s, generator=g, device=device) for n, s in zip(NAMES, shapes, strict=True)}
    for name, dim in zip(NAMES[1::2], dims, strict=True):
        args[name] *= spread / dim**0.5
    args = {n: t.to(dtype) for n, t in args.items()}
    args["student_hidden"].requires_grad_()
    args["student_weight"].requires_grad_(not frozen)
    return args


def labels_for(args):
    g = torch.Generator(args["student_hidden"].device).manual_seed(1)
    shape, vocab = args["student_hidden"].shape[:-1], len(args["student_weight"])
    labels = torch.randint(0, vocab, shape, generator=g, device=g.device)
    return torch.where(torch.rand(shape, generator=g, device=g.device) < 0.3, -100, labels)


def check(args, tolerance=None, gradients=True, **options):
    """Compare the loss, its parts and all gradients of the kernels with the reference in float64."""
    tolerance = tolerance or TOLERANCE[args["student_hidden"].dtype]
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in args.items()}
    got = linear_kl(**args, **options, return_parts=True, backend="triton")
    options.pop("chunk_size", None)
    want = reference.linear_kl(**exact, **options, return_parts=True)
    for name, g, w in zip(("loss", "divergence", "cross-entropy"), got, want, strict=True):
        assert g.dtype == torch.float32
        distance = (g.double() - w).abs()
        assert distance <= tolerance * (w + 0.1), f"{name}: {g} instead of {w}"
    assert not got[1].requires_grad and not got[2].requires_grad
    inputs = [n for n in NAMES if args[n].requires_grad and gradients]
    if not inputs:
        return
    got = torch.autograd.grad(got[0], [args[n] for n in inputs], torch.tensor(3.0, device=got[0].device))
    want = torch.autograd.grad(want[0] * 3, [exact[n] for n in inputs])
    for name, g, w in zip(inputs, got, want, strict=True):
        assert g.dtype == args[name].dtype
        assert_near(g, w, tolerance, f"d_{name}")


@pytest.mark.slow
@settings(max_examples=100 if GPU else 10)
@given(data=st.data())
def test_values_and_gradients(device, data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    vocab = draw(3, 31, 32, 70, 101)
    args = make(
        device,
        tokens=draw((), (1,), (5,), (3, 1, 3)),
        vocab=(vocab + draw(0, 0, 1, 40), vocab + draw(0, 0, 1, 40)),
        dims=(draw(8, 16, 24, 40), draw(8, 16, 24, 40)),
        dtype=draw(*DTYPES),
        spread=draw(2.0, 4.0),
        frozen=draw(False, False, True),
    )
    options = dict(
        divergence=draw("forward", "reverse", "jsd"),
        beta=draw(0.5, 0.1),
        temperature=draw(1.0, 1.0, 2.5),
        chunk_size=draw(None, 6, 8),
    )
    if draw(False, True):
        options.update(labels=labels_for(args), ce_weight=draw(1.0, 0.2), ce_over=draw("labels", "tokens"))
    if draw(False, True):
        mask = torch.arange(args["student_hidden"].shape[:-1].numel(), device=device) % 4 != draw(1, 2)
        options["mask"] = mask.to(draw(torch.bool, torch.int64, torch.float32)).view_as(args["student_hidden"][..., 0])
    check(args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_default_tiles(device, dtype, divergence, monkeypatch):
    monkeypatch.undo()
    many = GPU or (divergence, dtype) == ("forward", torch.float16)
    args = make(device, (133 if many else 5,), (300, 270), (72, 80), dtype)
    check(args, divergence=divergence, labels=labels_for(args), temperature=2.0)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_apart(device, dtype, divergence):
    """Where every 16-bit probability of the one is zero at the other's top, the loss is still right."""
    args = make(device, (5,), spread=100.0, dtype=dtype)
    # Reverse KL: p_s (log(p_s / p_t) - KL) is a difference of all but equal numbers here, in 16 bits mere rounding.
    gradients = divergence != "reverse" or dtype == torch.float32
    check(args, gradients=gradients, divergence=divergence, labels=labels_for(args))


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_cross_entropy_over_tokens(device, divergence, masked):
    args = make(device, (6,), (41, 33))
    labels = labels_for(args)
    labels[4] = -100
    options = dict(labels=labels, ce_weight=0.3, ce_over="tokens", divergence=divergence, temperature=2.0)
    if masked:
        options["mask"] = torch.arange(6, device=device) % 4 != 1
    check(args, **options)
    labels.fill_(-100)
    check(args, **options)


def test_masked_tokens_may_hold_nan(device):
    args = make(device, (9,))
    mask = torch.arange(9, device=device) % 3 == 0
    for name in NAMES[::2]:
        args[name].detach()[~mask] = math.nan
    options = dict(mask=mask, labels=labels_for(args), divergence="jsd")
    check(args, **options)
    loss = linear_kl(**args, **options, backend="triton")
    d_hidden, d_weight = torch.autograd.grad(loss, [args[n] for n in NAMES[:2]])
    assert (d_hidden[~mask] == 0).all() and d_weight.isfinite().all()


@pytest.mark.parametrize("ce_over", ["labels", "tokens"])
@pytest.mark.parametrize("tokens", [(4,), (0,), (2, 0)])
def test_no_token_counts(device, tokens, ce_over):
    args = make(device, tokens)
    mask = torch.zeros(tokens, device=device)
    options = dict(mask=mask, labels=labels_for(args), ce_over=ce_over)
    parts = linear_kl(**args, **options, return_parts=True, backend="triton")
    assert all(p == 0 for p in parts)
    for name, g in zip(NAMES, torch.autograd.grad(parts[0], [args[n] for n in NAMES[:2]]), strict=False):
        assert g.shape == args[name].shape and (g == 0).all()


def test_labels_out_of_range(device):
    args = make(device)
    for wrong in (-1, 40, 10**6):
        labels = torch.full((2, 3), -100, device=device)
        labels[1, 2] = wrong
        loss, divergence, cross_entropy = linear_kl(**args, labels=labels, return_parts=True, backend="triton")
        assert loss.isnan() and cross_entropy.isnan() and divergence.isfinite()


@pytest.mark.parametrize("numel", [1, 10**9])
@pytest.mark.parametrize("vocab", [(41, 41), (60, 33), (33, 60)])
def test_weight_gradient_in_halves(device, numel, vocab, monkeypatch):
    """bfloat16 gradients of large weights are rounded within the memory of their float32 sums."""
    monkeypatch.setattr(kl_triton, "HALVE_NUMEL", numel)
    args = make(device, (30,), vocab)
    for labels in (None, labels_for(args)):
        weight = args["student_weight"].detach().bfloat16()
        rows = len(weight) if labels is not None else min(vocab)
        total = kl_triton._WeightGradient(weight, rows)
        g = torch.Generator(device).manual_seed(0)
        want = torch.zeros(weight.shape, device=device)
        for _ in range(3):
            for block in (slice(0, 33), slice(33, rows)):
                a = torch.randn(len(weight[block.start : block.stop]), 7, generator=g, device=device)
                b = torch.randn(7, weight.shape[1], generator=g, device=device)
                if len(a):
                    total.add(block.start, a, b)
                    want[block] += a @ b
        got = total.finish(torch.tensor(0.5, device=device))
        assert got.dtype == torch.bfloat16 and got.shape == weight.shape and got.is_contiguous()
        torch.testing.assert_close(got.float(), want * 0.5, rtol=1e-2, atol=1e-3)


def test_gradients_that_nobody_needs_are_not_computed(device):
    def gradients(hidden, weight):
        args = make(device)
        args["student_hidden"].requires_grad_(hidden)
        args["student_weight"].requires_grad_(weight)
        loss = linear_kl(**args, backend="triton")
        assert loss.requires_grad == (hidden or weight)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), args["student_hidden"].grad, args["student_weight"].grad

    loss, d_hidden, d_weight = gradients(True, True)
    for hidden, weight in ((True, False), (False, True), (False, False)):
        got = gradients(hidden, weight)
        torch.testing.assert_close(got[0], loss)
        assert (got[1] is not None) == hidden and (got[2] is not None) == weight
        for g, w in zip(got[1:], (d_hidden, d_weight), strict=True):
            assert g is None or torch.equal(g, w)
    with torch.no_grad():
        torch.testing.assert_close(linear_kl(**make(device), backend="triton"), loss)


def test_strided_inputs(device):
    args = make(device, (2, 3))
    want = linear_kl(**args, backend="triton")
    wide = {n: torch.cat([t.detach(), t.detach() + 9, t.detach()], -1) for n, t in args.items()}
    views = {n: t[..., args[n].shape[-1] * 2 :] for n, t in wide.items()}
    assert torch.equal(linear_kl(**views, backend="triton"), want)
    odd = {n: torch.cat([t.detach()[..., :1], t.detach()], -1)[..., 1:] for n, t in args.items()}  # not aligned
    assert torch.equal(linear_kl(**odd, backend="triton"), want)
    columns = {n: t.detach().mT.contiguous().mT for n, t in args.items()}
    assert torch.equal(linear_kl(**columns, backend="triton"), want)
    one = {n: t.detach()[:1, :1].expand(2, 3, -1) if "hidden" in n else t.detach() for n, t in args.items()}
    small = {n: t[:1, :1] if "hidden" in n else t for n, t in one.items()}
    torch.testing.assert_close(linear_kl(**one, backend="triton"), linear_kl(**small, backend="triton"))


def test_autocast_and_mixed_dtypes(device):
    args = make(device, (3,))
    half = torch.bfloat16 if GPU else torch.float16
    with torch.autocast(device.type, half):
        loss = linear_kl(**args, backend="triton")
    rounded = {n: t.detach().to(half) for n, t in args.items()}
    assert torch.equal(loss.detach(), linear_kl(**rounded, backend="triton"))
    for g, n in zip(torch.autograd.grad(loss, [args[n] for n in NAMES[:2]]), NAMES, strict=False):
        assert g.dtype == torch.float32, n
    # A model in half precision beside one in float32; a half-precision hidden state with a float32 head.
    for names in (NAMES[:2], NAMES[2:], NAMES[:1]):
        mixed = {n: t.detach().to(half if n in names else t.dtype) for n, t in args.items()}
        for name in NAMES[:2]:
            mixed[name].requires_grad_()
        check(mixed, TOLERANCE[half])


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_opcheck(device, labels):
    args = make(device, (2,), (20, 24))
    tensors = [*args.values(), None, labels_for(args) if labels else None]
    dtypes = torch.float32, torch.float32
    rest = *dtypes, "forward", 0.5, 2.0, 1.0, "tokens", 7, True, True
    torch.library.opcheck(kl_triton.linear_kl.op, (*tensors, *rest))
    mask = torch.ones(2, dtype=torch.bool, device=device)
    frozen = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(kl_triton.linear_kl.op, (*frozen[:4], mask, frozen[5], *rest[:-2], False, False))
    grad = torch.randn(4, 3, device=device)
    torch.library.opcheck(kl_triton.linear_kl_backward.op, (torch.ones((), device=device), grad, torch.bfloat16))


def test_compile_fullgraph(device):
    args = make(device, (5,))
    labels = labels_for(args)
    mask = torch.arange(5, device=device) % 3 > 0

    def f(hidden, weight, factor):
        options = dict(mask=mask, labels=labels, ce_over="tokens", return_parts=True, backend="triton")
        loss, divergence, _ = linear_kl(
            hidden * factor, weight, args["teacher_hidden"], args["teacher_weight"], **options
        )
        return loss * 2, divergence

    def run(f):
        inputs = [args[n].detach().requires_grad_() for n in NAMES[:2]]
        outputs = f(*inputs, 1.5)
        return *outputs, *torch.autograd.grad(outputs[0], inputs)

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for got, want in zip(run(compiled), run(f), strict=True):
        torch.testing.assert_close(got, want)


def test_second_backward_of_a_retained_graph(device):
    args = make(device)
    loss = linear_kl(**args, backend="triton")
    inputs = [args[n] for n in NAMES[:2]]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for g, w in zip(torch.autograd.grad(loss, inputs), first, strict=True):
        assert torch.equal(g, w)


def test_differentiating_twice_is_an_error(device):
    args = make(device)
    for n in NAMES[:2]:
        loss = linear_kl(**args, backend="triton")
        (grad,) = torch.autograd.grad(loss, args[n], create_graph=True)
        with pytest.raises(RuntimeError, match="linear_kl: differentiable once only"):
            grad.sum().backward()


def test_unsupported(device):
    args = make(device, dims=(6, 8))
    with pytest.raises(ValueError, match='"triton" cannot run here: the kernels need hidden sizes'):
        linear_kl(**args, backend="triton")
    torch.testing.assert_close(linear_kl(**args), linear_kl(**args, backend="torch"))
    args = make(device, dtype=torch.float64)
    with pytest.raises(ValueError, match='"triton" cannot run here: the kernels take'):
        linear_kl(**args, backend="triton")
    args["student_hidden"] = args["student_hidden"].detach().float()
    with pytest.raises(ValueError, match='"triton" cannot run here: the kernels compute in'):
        linear_kl(**args, backend="triton")
    assert linear_kl(**args).dtype == torch.float64


@pytest.mark.gpu
class TestOnGPU:
    @pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
    @pytest.mark.parametrize(
        ("tokens", "dims", "vocab"), [(4096, 576, 49152), (700, 2048, 128256), (1000, 896, 151936)]
    )
    def test_real_shapes(self, device, tokens, dims, vocab, divergence):
        args = make(device, (tokens,), (vocab, vocab - 67), (dims, dims), torch.bfloat16)
        check(args, 1e-2, divergence=divergence)
        mask = torch.rand(tokens, device=device) < 0.8
        check(args, 1e-2, divergence=divergence, labels=labels_for(args), mask=mask)
        args = make(device, (tokens,), (vocab, vocab), (dims, dims), spread=2.0)
        check(args, 1e-3, divergence=divergence, temperature=2.0)

    def test_memory(self, device):
        args = make(device, (8192,), (49152, 49152), (576, 576), torch.bfloat16)
        linear_kl(**args, backend="triton").backward()
        args["student_hidden"].grad = args["student_weight"].grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_kl(**args, backend="triton").backward()
        assert torch.cuda.max_memory_allocated() - before < 400e6

    def test_weight_gradient_is_summed_in_float32(self, device):
        # 4096 equal tokens: a bfloat16 running sum would stall when a chunk's share is 1/256 of it.
        args = make(device, (1,), (1024, 1024), (64, 64), torch.bfloat16)
        many = {n: t.detach().expand(4096, -1) if "hidden" in n else t for n, t in args.items()}
        weight = args["student_weight"]
        (once,) = torch.autograd.grad(linear_kl(**args, backend="triton"), weight)
        (grad,) = torch.autograd.grad(linear_kl(**many, chunk_size=4, backend="triton"), weight)
        torch.testing.assert_close(grad, once, rtol=2**-6, atol=0)

    def test_deterministic_and_graphs(self, device):
        args = make(device, (2500,), (4096, 4096), (128, 128), torch.bfloat16)
        mask = torch.rand(2500, device=device) < 0.9
        labels = labels_for(args)

        def run():
            loss = linear_kl(**args, mask=mask, labels=labels, ce_over="tokens", backend="triton")
            return loss.detach(), *torch.autograd.grad(loss, [args[n] for n in NAMES[:2]])

        want = run()
        for got, w in zip(run(), want, strict=True):
            assert torch.equal(got, w)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        mask.logical_not_()
        graph.replay()
        for got, w in zip(outputs, run(), strict=True):
            assert torch.equal(got, w)
