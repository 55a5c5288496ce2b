"""The Triton kernels of mixing_distance against the reference in float64: compiled on a GPU, else interpreted."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import matching_reference as reference
from transpoint.kernels.matching import mixing_distance

pytest.importorskip("triton")
from transpoint.kernels import matching_triton  # noqa: E402

GPU = torch.cuda.is_available()
# Triton's interpreter multiplies bfloat16 matrices wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# Of ||got - want|| / ||want||.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (H, K of the keys, Hb, Hc): nothing shared, what a converted teacher has, what Mamba-2 has, other ways of sharing.
GROUPINGS = [(2, 2, 2, 2), (3, 1, 1, 3), (4, 2, 1, 1), (4, 1, 4, 2), (4, 4, 2, 4)]
TRAINED = ("dt", "A", "B", "C", "dt_bias")


def make(device, length, grouping=(2, 1, 1, 2), batch=1, P=16, N=16, dtype=torch.float32, seed=0, rate=1.0):
    """Random arguments of mixing_distance; the student's require grad."""
    heads, hk, hb, hc = grouping
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=g).to(device, kind)

    args = dict(
        q=normal(batch, length, heads, P),
        k=normal(batch, length, hk, P),
        dt=normal(batch, length, heads),
        A=(-rate * (0.02 + torch.rand(heads, generator=g))).to(device),
        B=normal(batch, length, hb, N),
        C=normal(batch, length, hc, N) * N**-0.5,
        dt_bias=normal(heads, kind=torch.float32),
    )
    return {name: t.requires_grad_(name in TRAINED) for name, t in args.items()}


def sequences(device, batch, length, every, seed=0):
    """seq_idx with a new document about `every` tokens."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=g) < 1 / every).long().cumsum(1).to(device)


def with_gradients(function, args, **options):
    """Distance, norm and the gradients of a fixed random combination of the distances."""
    distance, norm = function(**args, **options, return_norm=True)
    weights = torch.rand(distance.shape, generator=torch.Generator().manual_seed(1)).to(distance)
    names = [name for name in TRAINED if args.get(name) is not None]
    grads = torch.autograd.grad((distance * weights).sum(), [args[name] for name in names])
    return {"distance": distance, "norm": norm, **{f"d{n}": grad for n, grad in zip(names, grads, strict=True)}}


def assert_near(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    error = torch.linalg.vector_norm(got.double() - want)
    scale = torch.linalg.vector_norm(want) + 1e-3 * want.numel() ** 0.5
    assert error <= tolerance * scale, f"{name}: relative error {error / scale:.1e}"  # also false for NaN


def check(args, tolerance=None, **options):
    """Compare values and all gradients of the kernels with the reference in float64."""
    tolerance = tolerance or TOLERANCE[args["C"].dtype]
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in args.items()}
    want = with_gradients(reference.mixing_distance, exact, **options)
    got = with_gradients(mixing_distance, args, **options, backend="triton")
    for name in want:
        assert_near(got[name], want[name], tolerance, name)
        kind = torch.float32 if name in ("distance", "norm") else args[name[1:]].dtype
        assert got[name].dtype == kind, name
    return got


@pytest.mark.slow
@settings(max_examples=20 if GPU else 6)
@given(data=st.data())
def test_values_and_gradients(device, data):
    def draw(values):
        return data.draw(st.sampled_from(values))

    length, (P, N) = data.draw(st.integers(1, 50 if GPU else 40)), draw([(16, 16), (8, 24), (33, 20)])
    grouping = draw(GROUPINGS)
    batch = 1 if grouping[0] > 1 else draw([1, 2])
    args = make(device, length, grouping, batch, P, N, draw(DTYPES), rate=draw([1.0, 0.05, 8.0]))
    options = {}
    if draw([False, True]):
        del args["dt_bias"]
    if draw([False, True]):
        options["seq_idx"] = sequences(device, batch, length, draw([3, 30]), seed=length)
    if draw([False, True]):
        options["mask"] = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).to(device) > 0.2
    if draw([False, True]):
        options |= dict(window=draw([1, 5, 40]))
    if draw([False, True]):
        options |= dict(softcap=2.0, scale=0.7)
    if draw([False, True]):
        options["dt_softplus"] = False
        with torch.no_grad():  # steps are >= 0
            for name in {"dt", "dt_bias"} & args.keys():
                args[name].abs_()
    check(args, **options)


@pytest.mark.parametrize("length", [1, 32, 33, pytest.param(129, marks=pytest.mark.slow)])
def test_lengths(device, length):
    check(make(device, length, (1, 1, 1, 1)))


@pytest.mark.parametrize("case", ["erased at once", "steps of both kinds", "long memory", "documents"])
def test_any_decay(device, case):
    """Of 0 and 1, of tiles left out and tiles that count, and sums of log decays of -10^4."""
    args = make(device, 100, (1, 1, 1, 1))
    del args["dt_bias"]
    with torch.no_grad():
        args["dt"].fill_(8)
        args["A"].fill_(-16)
        if case in ("steps of both kinds", "documents"):
            args["dt"][:, torch.arange(100) % 40 > 0] = 1e-4
        if case == "long memory":
            args["A"].fill_(-1e-4)
    options = dict(seq_idx=sequences(device, 1, 100, 30)) if case == "documents" else {}
    check(args, dt_softplus=False, tolerance=1e-4 if case == "long memory" else 1e-3, **options)


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 12])
def test_packed_documents_equal_separate_documents(device, window):
    lengths = [20, 1, 40, 10]
    args = make(device, sum(lengths), (2, 1, 1, 1))
    seq_idx = torch.cat([torch.full((1, n), i) for n, i in zip(lengths, [5, 6, 9, 5], strict=True)], 1).to(device)
    got = with_gradients(mixing_distance, args, seq_idx=seq_idx, window=window, backend="triton")
    parts, start = [], 0
    for n in lengths:
        part = {k: v if k in ("A", "dt_bias") else v[:, start : start + n] for k, v in args.items()}
        part = {k: v.detach().double().requires_grad_(k in TRAINED) for k, v in part.items()}
        parts.append(with_gradients(reference.mixing_distance, part, window=window))
        start += n
    for name in got:
        values = [part[name] for part in parts]
        assert_near(got[name], torch.cat(values, 1) if name in ("ddt", "dB", "dC") else sum(values), 5e-5, name)


@pytest.mark.parametrize("side", ["left", "right", "all"])
def test_padding(device, side):
    mask = torch.zeros(1, 50, dtype=torch.int32, device=device)
    if side != "all":
        mask[:, slice(37, None) if side == "left" else slice(None, 40)] = 1
    args = make(device, 50)
    with torch.no_grad():
        args["k"][:, mask[0] == 0] *= 1e4  # of no effect: neither infinite nor NaN
    got = check(args, mask=mask)
    for name in ("ddt", "dB", "dC"):
        assert (got[name][:, mask[0] == 0] == 0).all(), name


def test_zero_where_the_matrices_are_equal(device):
    """Scores that depend on the key alone make attention a matrix of rank one below the diagonal, as M can be."""
    length, rate = 70, 0.02
    score = torch.randn(length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.arange(length, dtype=torch.float64)
    q, k, dt = (torch.zeros(1, length, 1, 16) for _ in range(3))
    q[..., 0], k[..., 0] = 1, score.view(1, length, 1)
    B, C = torch.zeros_like(q), torch.zeros_like(q)
    B[..., 3] = (score.exp() * torch.exp(-rate * t)).view(1, length, 1)
    C[..., 3] = (torch.exp(rate * t) / score.exp().cumsum(0)).view(1, length, 1)
    args = dict(q=q, k=k, dt=torch.ones(1, length, 1), A=torch.tensor([-rate]), B=B, C=C)
    args = {name: v.to(device).requires_grad_(name in TRAINED) for name, v in args.items()}
    got = with_gradients(mixing_distance, args, scale=1.0, dt_softplus=False, backend="triton")
    assert got["distance"].item() <= 2e-6 * got["norm"].item()
    for name in TRAINED[:-1]:  # from differences of the entries, which are all rounding
        # A sums up all entries, each times its distance from the diagonal.
        assert got[f"d{name}"].abs().max() < (1e-4 if name == "A" else 1e-5), name


def test_views_of_one_wide_projection(device):
    args = make(device, 20, (2, 2, 2, 2), dtype=torch.float16)
    want = with_gradients(mixing_distance, args, backend="triton")
    names = ("q", "k", "dt", "B", "C")
    wide = torch.cat([args[name].detach().flatten(2) for name in names], -1)
    views = dict(zip(names, wide.split([args[name].flatten(2).shape[2] for name in names], -1), strict=True))
    views = {name: v.view(args[name].shape).requires_grad_(name in TRAINED) for name, v in views.items()}
    assert not views["B"].is_contiguous()
    got = with_gradients(mixing_distance, {**args, **views}, backend="triton")
    for name in want:
        assert_near(got[name], want[name].double(), 1e-5, name)
    turned = {
        n: v.detach().transpose(1, 3).contiguous().transpose(1, 3) for n, v in args.items() if n in ("q", "B", "C")
    }
    turned |= {n: args[n].detach().repeat_interleave(2)[::2] for n in ("A", "dt_bias")}
    turned = {name: v.requires_grad_(name in TRAINED) for name, v in turned.items()}
    got = with_gradients(mixing_distance, {**args, **turned}, backend="triton")
    for name in want:
        assert_near(got[name], want[name].double(), 1e-5, name)


def test_mixed_dtypes_and_an_expanded_gradient(device):
    args = make(device, 40, dtype=torch.float16)
    args["C"] = args["C"].detach().float().requires_grad_()
    args["k"] = args["k"].float()
    exact = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in args.items()}
    mixing_distance(**args, backend="triton").sum().backward()
    reference.mixing_distance(**exact).sum().backward()
    for name in TRAINED:
        assert args[name].grad.dtype == args[name].dtype
        assert_near(args[name].grad, exact[name].grad, 1e-3, name)


def test_sums_over_heads_in_parts(device, monkeypatch):
    monkeypatch.setattr(matching_triton, "_splits", lambda programs, sharing, device: min(sharing, 2))
    check(make(device, 20, (4, 1, 1, 2)))


def registered(device):
    args = {name: t.detach() for name, t in make(device, 9).items()}
    seq_idx, mask = sequences(device, 1, 9, 5), torch.ones(1, 9, device=device)
    return (*args.values(), seq_idx, mask, 0.25, True, 7, 3.0)


@pytest.mark.slow
def test_registered_operators(device):
    inputs = registered(device)
    lse = torch.ops.transpoint.mixing_distance(*inputs)[2]
    plain = ("test_schema", "test_autograd_registration", "test_faketensor")
    backward = torch.ops.transpoint.mixing_distance_backward.default
    torch.library.opcheck(backward, (lse, torch.ones(1, 2, device=device), *inputs), test_utils=plain)
    torch.library.opcheck(
        backward, (lse, torch.ones(1, 2, device=device), *inputs[:6], None, *inputs[7:]), test_utils=plain
    )
    inputs = [t.requires_grad_() if 2 <= i < 7 else t for i, t in enumerate(inputs)]
    torch.library.opcheck(torch.ops.transpoint.mixing_distance.default, tuple(inputs))


@pytest.mark.slow
def test_compiles_without_graph_breaks(device):
    seq_idx = sequences(device, 1, 20, 9)

    def loss(args):
        distance, norm = mixing_distance(**args, seq_idx=seq_idx, return_norm=True, backend="triton")
        return (distance / norm).mean()

    args = make(device, 20)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    tensors = [args[name] for name in TRAINED]
    for a, b in zip(
        torch.autograd.grad(compiled(args), tensors), torch.autograd.grad(loss(args), tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused(device):
    args = make(device, 5)
    (dC,) = torch.autograd.grad(mixing_distance(**args, backend="triton").sum(), args["C"], create_graph=True)
    with pytest.raises(RuntimeError, match="^mixing_distance: differentiable once only"):
        dC.sum().backward()


def test_the_teacher_and_the_norm_get_no_gradient(device):
    args = make(device, 5)
    for name in ("q", "k"):
        args[name].requires_grad_()
    distance, norm = mixing_distance(**args, return_norm=True, backend="triton")
    assert distance.requires_grad and not norm.requires_grad
    distance.sum().backward()
    assert args["q"].grad is None and args["k"].grad is None and args["C"].grad is not None


def test_what_the_kernels_cannot_do(device):
    args = make(device, 5)
    exact = {name: t.double() for name, t in args.items()}
    with pytest.raises(ValueError, match="cannot run here: .*float64"):
        mixing_distance(**exact, backend="triton")
    assert mixing_distance(**exact).dtype == torch.float64
    with pytest.raises(ValueError, match="no float64"):
        mixing_distance(**{**args, "q": exact["q"]}, backend="triton")
    with pytest.raises(ValueError, match="head_dim and state of at most 256, got 16 and 257"):
        mixing_distance(**make(device, 5, N=257), backend="triton")
    with pytest.raises(ValueError, match="^window: expected a positive integer, got 0$"):
        mixing_distance(**args, window=0, backend="triton")


def test_the_same_bits_every_time(device):
    args = make(device, 20, (2, 1, 1, 1))
    first, second = (with_gradients(mixing_distance, args, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("grouping", "P", "N", "length"),
    [
        ((8, 8, 8, 8), 64, 64, 2048),
        ((9, 3, 3, 9), 64, 64, 2000),
        ((8, 2, 1, 1), 64, 128, 1500),
        ((4, 1, 1, 4), 128, 128, 1111),
        ((4, 4, 2, 4), 128, 256, 777),
        ((4, 4, 4, 4), 32, 16, 999),
        ((4, 4, 4, 4), 96, 80, 1024),
    ],
    ids=str,
)
def test_real_shapes(device, grouping, P, N, length, dtype):
    tolerance = 1e-3 if dtype == torch.float32 else TOLERANCE[dtype]
    args = make(device, length, grouping, 2, P, N, dtype, rate=0.1)
    check(args, tolerance)
    check(args, tolerance, seq_idx=sequences(device, 2, length, 300))


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["window", "softcap", "mask", "all"])
def test_real_shapes_with_options(device, option):
    args = make(device, 1500, (8, 2, 2, 8), 2, 64, 64, torch.bfloat16, rate=0.1)
    options = dict(window=256, softcap=30.0, mask=torch.rand(2, 1500, device=device) > 0.1)
    options = options | dict(seq_idx=sequences(device, 2, 1500, 400)) if option == "all" else {option: options[option]}
    check(args, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["erased at once", "steps of both kinds", "long memory"])
def test_long_sequences(device, case, dtype):
    args = make(device, 4096, (2, 1, 1, 2), 1, 64, 64, dtype)
    del args["dt_bias"]
    with torch.no_grad():
        args["dt"].fill_(4)
        args["A"].fill_(-16)
        if case == "steps of both kinds":
            args["dt"][:, torch.arange(4096) % 100 > 0] = 1e-4
        if case == "long memory":
            args["A"].fill_(-1e-5)
    check(args, 1e-3 if dtype == torch.float32 else None, dt_softplus=False)


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("grouping", [(4, 4, 4, 4), (4, 2, 2, 4)], ids=str)
def test_other_launch_parameters(device, warps, stages, grouping, monkeypatch):
    own = 16 * warps

    def config(kernel, *_):
        sides = dict(T=64, S=own) if kernel == "columns" else dict(T=own, S=64)
        return {**sides, "D": 32, "num_warps": warps, "num_stages": stages}

    monkeypatch.setattr(matching_triton, "config", config)
    check(make(device, 1000, grouping, 2, 64, 64, torch.bfloat16, rate=0.1))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    wide = torch.empty(1, 70000, 32768, device=device, dtype=torch.bfloat16)  # 2.3e9 elements
    ends = [wide[:, :, i : i + 64].normal_() for i in (0, 64, 32640, 32704)]
    q, k, B, C = (t.unflatten(2, (1, 64)) for t in ends)
    dt = torch.full((1, 70000, 1), 0.3, device=device)
    args = dict(q=q, k=k, dt=dt, A=-torch.ones(1, device=device), B=B, C=C)
    args = {name: t.detach().requires_grad_(name in TRAINED) for name, t in args.items()}
    got = with_gradients(mixing_distance, args, window=100, dt_softplus=False, backend="triton")
    close = {name: t.detach() if name == "A" else t.detach().contiguous() for name, t in args.items()}
    close = {name: t.requires_grad_(name in TRAINED) for name, t in close.items()}
    want = with_gradients(mixing_distance, close, window=100, dt_softplus=False, backend="triton")
    for name in want:
        assert_near(got[name], want[name].double(), 1e-4, name)
