"""The Triton kernels of ssd_scan and ssd_step against the reference in float64: compiled on a GPU, else interpreted."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import ssd_reference as reference
from transpoint.kernels.ssd import ssd_scan, ssd_step

GPU = torch.cuda.is_available()
# Triton's interpreter multiplies bfloat16 matrices wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# Relative L2 error; float32 products are sums of three in TF32.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (H, Hx, Hb, Hc): nothing shared, what Mamba-2 has, what a converted teacher has, and other ways of sharing. The first
# two take all kernels of whole sequences between them, but for that of segments.
GROUPINGS = [
    (2, 2, 2, 2),
    (4, 4, 1, 1),
    (6, 2, 2, 6),
    (6, 6, 2, 2),
    (4, 1, 1, 1),
    (4, 1, 4, 2),
    (6, 2, 3, 6),
    (6, 6, 3, 2),
]


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def make(device, length, grouping=(4, 2, 2, 4), batch=2, P=16, N=16, dtype=torch.float32, seed=0):
    """Random arguments of ssd_scan as a dict of leaves that require grad."""
    heads, hx, hb, hc = grouping
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=g).to(device, kind).requires_grad_()

    return dict(
        x=normal(batch, length, hx, P),
        dt=normal(batch, length, heads),
        A=(-0.05 - 2 * torch.rand(heads, generator=g)).to(device).requires_grad_(),
        B=normal(batch, length, hb, N),
        C=(normal(batch, length, hc, N).detach() * N**-0.5).requires_grad_(),
        D=normal(heads, kind=torch.float32),
        dt_bias=normal(heads, kind=torch.float32),
        initial_state=normal(batch, heads, P, N, kind=torch.float32),
    )


def documents(device, batch, length, seed=0, count=3):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=g) < count / length).long().cumsum(1).to(device)


def with_gradients(function, args, **options):
    """Outputs and the gradients of a fixed random combination of y and the final state."""
    y, state = function(**args, **options, return_final_state=True)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in (y, state)]
    grads = torch.autograd.grad([y, state], list(args.values()), weights)
    return {"y": y, "state": state, **{f"d{name}": grad for name, grad in zip(args, grads, strict=True)}}


def with_terms(args, **options):
    """What the reference gives, and of gradients that are sums over tokens the norm of the sums of absolute terms."""
    seen, decays = [], reference._decays

    def watched(log_decay, document):
        log_decay.retain_grad()
        seen.append(log_decay)
        return decays(log_decay, document)

    with mock.patch.object(reference, "_decays", watched):
        y, state = reference.ssd_scan(**args, **options, return_final_state=True)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(t.device, t.dtype) for t in (y, state)]
    torch.autograd.backward([y, state], weights)
    want = {"y": y.detach(), "state": state.detach(), **{f"d{name}": arg.grad for name, arg in args.items()}}
    A, heads = args["A"].detach(), len(args["A"])

    def by_token(t):  # (B, chunks, H, Q) -> (B, L, H)
        return t.transpose(2, 3).flatten(1, 2)[:, : args["dt"].shape[1]]

    step = (args["dt"] + args.get("dt_bias", 0)).detach()
    slope = torch.ones_like(step)
    if options.get("dt_softplus", True):
        step, slope = torch.nn.functional.softplus(step), torch.sigmoid(step)
    decay = by_token(seen[0].grad) * A  # of what a step does to the decay; the rest is what it adds to the state
    added = want["ddt"] / slope - decay
    ddt = (decay.abs() + added.abs()) * slope
    x = args["x"].detach().repeat_interleave(heads // args["x"].shape[2], 2)
    sums = {"dA": (decay / A * step).abs().sum((0, 1)), "ddt_bias": ddt.sum((0, 1)), "ddt": ddt}
    sums["dD"] = (weights[0] * x).abs().sum((0, 1, 3))
    # C reads a state of P numbers, each times what y's own are worth.
    read = {name: t.detach().abs() for name, t in args.items() if name not in ("A", "dt", "dt_bias")}
    fixed = {name: args[name].detach() for name in ("A", "dt", "dt_bias") if name in args}
    positive = read | fixed | {"C": read["C"].requires_grad_()}
    y, _ = reference.ssd_scan(**positive, **options, return_final_state=True)
    sums["dC"] = torch.autograd.grad(y, positive["C"], weights[0].abs())[0]
    # Where nothing is left of any term, in float64 even, an error is measured against 1.
    return want, {name: value.norm() if value.any() else 1.0 for name, value in sums.items() if name in want}


def assert_close(args, tolerance, want_args=None, **options):
    got = with_gradients(ssd_scan, args, backend="triton", **options)
    double = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    options.pop("chunk_size", None)
    want, terms = with_terms(double, **options)
    for name in want:
        assert got[name].dtype == (args[name[1:]] if name[1:] in args else got[name]).dtype
        assert got[name].isfinite().all(), name
        # A gradient of few numbers may be a sum that all but cancels: what rounds are its terms.
        scale = terms.get(name, want[name].norm() if want[name].any() else 1.0)
        error = (got[name].double() - want[name]).norm() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("grouping", [*GROUPINGS[:2], *map(slow, GROUPINGS[2:] if GPU else GROUPINGS[5::2])], ids=str)
def test_values_and_gradients_for_every_head_grouping(device, grouping):
    batch = 2 if grouping == (2, 2, 2, 2) else 1
    dtype = torch.float16 if grouping[0] == 6 else torch.float32
    args = make(device, 37, grouping, batch, dtype=dtype)
    assert_close(args, TOLERANCE[dtype], seq_idx=documents(device, batch, 37), chunk_size=16)


@pytest.mark.slow
@settings(deadline=None, max_examples=6 if not GPU else 60)
@given(data=st.data())
def test_any_shape_dtype_decay_and_documents(device, data):
    length = data.draw(st.integers(1, 70 if GPU else 40), "length")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    grouping = data.draw(st.sampled_from(GROUPINGS), "grouping")
    P, N = data.draw(st.sampled_from([8, 16, 20, 32])), data.draw(st.sampled_from([8, 16, 24, 32]))
    args = make(device, length, grouping, batch=1, P=P, N=N, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    with torch.no_grad():
        # Strong decay leaves so little of dA that half precision cannot tell it.
        args["A"].mul_(
            data.draw(st.sampled_from([1e-3, 1.0, 10.0] if dtype == torch.float32 else [1e-3, 1.0]), "decay")
        )
    for name in ("D", "dt_bias", "initial_state"):
        if data.draw(st.booleans(), name):
            del args[name]
    options = {"seq_idx": documents(device, 1, length)} if data.draw(st.booleans(), "documents") else {}
    assert_close(args, TOLERANCE[dtype], **options, chunk_size=data.draw(st.sampled_from([16, 32, None])))


@pytest.mark.parametrize("grouping", [slow((2, 2, 2, 2)), (2, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("packed", [slow(False), True])
def test_walks_in_segments(device, monkeypatch, grouping, packed):
    from transpoint.kernels import ssd_triton

    monkeypatch.setattr(ssd_triton, "sm_count", lambda device: 100)
    args = make(device, 70, grouping, batch=1)  # three segments of two chunks, the last but one chunk long
    options = {"seq_idx": documents(device, 1, 70)} if packed else {}
    assert_close(args, TOLERANCE[torch.float32], **options, chunk_size=16)


def test_head_dim_larger_than_registers_goes_in_parts(device):
    args = make(device, 20, (2, 1, 1, 2), batch=1, P=80)
    assert_close(args, TOLERANCE[torch.float32], chunk_size=16)


@pytest.mark.parametrize("grouping", [(1, 1, 1, 1), (2, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("tiny_steps", [slow(False), True])
def test_strong_decay_is_finite_and_accurate(device, grouping, tiny_steps):
    args = make(device, 130, grouping, batch=1)
    del args["dt_bias"]
    with torch.no_grad():
        args["A"].fill_(-16)
        args["dt"].fill_(4)
        if tiny_steps:  # steps that keep the state, between steps that erase it
            args["dt"][:, 1::2] = 0.001
    assert_close(args, 1e-3, dt_softplus=False)


def test_small_steps_keep_their_precision(device):
    args = make(device, 40, batch=1)
    with torch.no_grad():
        args["dt_bias"].fill_(-12)  # softplus near 6e-6
    assert_close(args, TOLERANCE[torch.float32])


def test_padding_steps_leave_the_state_as_it_is(device):
    args = make(device, 24, batch=1)
    short = {k: v[:, :17].clone() if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
    with torch.no_grad():
        args["dt"][:, 17:] = -1e4
    _, padded = ssd_scan(**args, return_final_state=True, backend="triton")
    _, state = ssd_scan(**short, return_final_state=True, backend="triton")
    torch.testing.assert_close(padded, state, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(padded.sum(), [args["x"], args["dt"]])
    assert all((grad[:, 17:] == 0).all() for grad in grads)


def test_views_of_one_wide_projection(device):
    args = {k: v.detach() for k, v in make(device, 20, (4, 2, 2, 4)).items()}
    parts = [args["x"].flatten(2), args["B"].flatten(2), args["C"].flatten(2), args["dt"]]
    wide = torch.cat([torch.full_like(parts[0], torch.nan), *parts], -1)
    _, x, B, C, dt = wide.split([32, 32, 32, 64, 4], -1)
    views = dict(x=x.unflatten(2, (2, 16)), B=B.unflatten(2, (2, 16)), C=C.unflatten(2, (4, 16)), dt=dt)
    got = ssd_scan(**{**args, **views}, backend="triton")
    assert torch.equal(got, ssd_scan(**args, backend="triton"))
    # A last dimension that is not contiguous is copied.
    args["C"] = args["C"].mT.contiguous().mT
    for name in ("A", "D", "dt_bias"):
        args[name] = args[name].repeat_interleave(2)[::2]
    args["initial_state"] = args["initial_state"].mT.contiguous().mT
    assert torch.equal(got, ssd_scan(**args, backend="triton"))


def test_gradient_of_the_final_state_alone_and_of_y_alone(device):
    args = make(device, 20, batch=1)
    double = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    for index in (0, 1):
        got = ssd_scan(**args, return_final_state=True, backend="triton")[index]
        want = reference.ssd_scan(**double, return_final_state=True)[index]
        names = ["x", "dt", "A", "B", "initial_state"]
        for name, g, w in zip(
            names,
            torch.autograd.grad(got.square().sum(), [args[n] for n in names]),
            torch.autograd.grad(want.square().sum(), [double[n] for n in names]),
            strict=True,
        ):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_some_inputs_without_gradient(device):
    args = make(device, 20, batch=1)
    want = with_gradients(ssd_scan, args, backend="triton")
    for name in ("x", "initial_state", "A"):
        args[name].requires_grad_(False)
    y, state = ssd_scan(**args, return_final_state=True, backend="triton")
    torch.testing.assert_close(y, want["y"])
    y, state = (w.to(device) for w in (y, state))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(device) for t in (y, state)]
    (dB,) = torch.autograd.grad([y, state], [args["B"]], weights)
    torch.testing.assert_close(dB, want["dB"])


def test_mixed_dtypes_are_promoted(device):
    args = {k: v.detach() for k, v in make(device, 20, batch=1).items()}
    half = {**args, "x": args["x"].half()}
    y = ssd_scan(**half, backend="triton")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, ssd_scan(**{**args, "x": half["x"].float()}, backend="triton").half())


def test_second_derivatives_are_refused(device):
    args = make(device, 8, batch=1)
    (dx,) = torch.autograd.grad(ssd_scan(**args, backend="triton").square().sum(), [args["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="^ssd_scan: differentiable once only"):
        dx.sum().backward()


@pytest.mark.slow
def test_custom_ops_keep_their_contracts(device):
    from transpoint.kernels import ssd_step_triton, ssd_triton

    args = make(device, 20, (2, 1, 1, 2), batch=1)
    order = ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"]
    for training in (True, False):
        inputs = [args[k] if training else args[k].detach() for k in order]
        seq_idx = documents(device, 1, 20)
        torch.library.opcheck(ssd_triton.ssd_scan.op, (*inputs, seq_idx, True, True, 16, training))
    inputs = [args[k].detach()[:, 0] if k in ("x", "dt", "B", "C") else args[k].detach() for k in order[:-1]]
    state = args["initial_state"].detach().clone()
    torch.library.opcheck(ssd_step_triton.ssd_step.op, (state, *inputs, True))


@pytest.mark.parametrize("grouping", [(4, 2, 2, 4), (3, 3, 3, 3), (4, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_reference(device, grouping, state_dtype):
    args = {k: v.detach() for k, v in make(device, 3, grouping, P=20, N=24).items()}
    state = args.pop("initial_state").to(state_dtype)
    want_state = state.clone()
    for t in range(3):
        token = {k: v[:, t] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
        want = ssd_step(want_state, **token, backend="torch")
        torch.testing.assert_close(ssd_step(state, **token, backend="triton"), want, rtol=2e-2, atol=1e-3)
        tolerance = 2e-2 if state_dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(state, want_state, rtol=tolerance, atol=tolerance)
        want_state.copy_(state)


def test_step_in_a_slice_of_a_larger_cache(device):
    args = {k: v.detach()[:, 0] if k in ("x", "dt", "B", "C") else v.detach() for k, v in make(device, 1).items()}
    state = args.pop("initial_state")
    cache = torch.full((5, *state.shape[1:]), torch.nan, device=device)
    cache[2:4] = state
    want = ssd_step(state, **args, backend="triton")
    assert torch.equal(ssd_step(cache[2:4], **args, backend="triton"), want)
    assert torch.equal(cache[2:4], state) and cache[[0, 1, 4]].isnan().all()


def test_what_the_kernels_cannot_do_is_said(device):
    args = {k: v.detach() for k, v in make(device, 4).items()}
    with pytest.raises(ValueError, match='^backend: "triton" cannot run here: the kernels take float16, bfloat16 and'):
        ssd_scan(**{k: v.double() for k, v in args.items()}, backend="triton")
    with pytest.raises(ValueError, match='^backend: expected "auto", "triton" or "torch", got \'cuda\'$'):
        ssd_scan(**args, backend="cuda")
    large = make(device, 4, (1, 1, 1, 1), batch=1, N=300)
    with pytest.raises(ValueError, match="^backend: .* a state of at most 256, got 300; use"):
        ssd_scan(**large, backend="triton")
    torch.testing.assert_close(ssd_scan(**large), ssd_scan(**large, backend="torch"))
    with pytest.raises(ValueError, match="^x: expected a number of heads that divides H = 4, got 3$"):
        ssd_scan(**{**args, "x": torch.zeros(2, 4, 3, 16, device=device)}, backend="triton")
    with pytest.raises(ValueError, match="^x: expected at least one token, got B = 0$"):
        ssd_scan(**make(device, 4, batch=0), backend="triton")


# Real shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [32, 64, 96, 128])
@pytest.mark.parametrize("N", [16, 64, 128, 256])
@pytest.mark.parametrize("grouping", [(4, 4, 4, 4), (9, 3, 3, 9), (8, 8, 1, 1)], ids=str)
def test_real_shapes(device, grouping, N, P, dtype):
    if dtype == torch.float16 and (P, N) != (64, 64):
        pytest.skip("one shape is enough: float16 takes the code of bfloat16")
    args = make(device, 700, grouping, P=P, N=N, dtype=dtype)
    tolerance = {torch.float32: 1e-3}.get(dtype, 1e-2)
    assert_close(args, tolerance, seq_idx=documents(device, 2, 700, seed=N))


@pytest.mark.gpu
@pytest.mark.parametrize("grouping", [(9, 9, 9, 9), (9, 3, 3, 9), (8, 8, 2, 2)], ids=str)
def test_long_sequences_in_bfloat16(device, grouping):
    args = make(device, 5000, grouping, P=64, N=64 if grouping[0] == 9 else 128, dtype=torch.bfloat16, batch=1)
    assert_close(args, 1e-2)
    with torch.no_grad():
        args["A"].fill_(-16)
        args["dt"].fill_(4)
        args["dt"][:, 1::3] = -7
    assert_close(args, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("grouping", [(4, 4, 4, 4), (9, 3, 3, 9), (8, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("N", [64, 128, 256])
def test_every_run_gives_the_same_bits(device, grouping, N):
    """Nothing is added up in an order that varies: what differs is a race."""
    args = make(device, 2000, grouping, P=128, N=N, dtype=torch.bfloat16)
    first = with_gradients(ssd_scan, args, backend="triton")
    for _ in range(10):
        again = with_gradients(ssd_scan, args, backend="triton")
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    # 131072 tokens in a projection 20000 wide: x alone spans 2.6e9 elements.
    wide = torch.empty(1, 131072, 20000, dtype=torch.bfloat16, device=device)
    g = torch.Generator(device).manual_seed(0)
    wide[..., :224] = torch.randn(1, 131072, 224, generator=g, device=device)
    x, B, C, dt = (wide[..., a:b] for a, b in ((0, 64), (64, 128), (128, 192), (192, 194)))
    args = dict(x=x.unflatten(2, (2, 32)), B=B.unflatten(2, (1, 64)), C=C.unflatten(2, (1, 64)) / 8, dt=dt - 2)
    args["A"] = torch.tensor([-0.5, -1.0], device=device)
    args = {k: v.requires_grad_() for k, v in args.items()}
    y = ssd_scan(**args, backend="triton")
    copy = {k: v.detach().contiguous().requires_grad_() for k, v in args.items()}
    want = ssd_scan(**copy, backend="triton")
    assert torch.equal(y, want)
    tail = {k: v[:, -600:].detach().double() if v.dim() > 1 else v.detach().double() for k, v in copy.items()}
    end = reference.ssd_scan(**tail)[:, -64:]
    assert (y[:, -64:].double() - end).norm() / end.norm() < 1e-2


@pytest.mark.gpu
def test_compiles_without_graph_breaks_and_runs_in_a_cuda_graph(device):
    args = make(device, 300, (9, 3, 3, 9), P=64, N=64, dtype=torch.bfloat16)

    def loss(**args):
        y, state = ssd_scan(**args, return_final_state=True)
        return y.float().square().mean() + state.square().mean()

    want = torch.autograd.grad(loss(**args), list(args.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**args), list(args.values()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-2, atol=1e-4)

    detached = {k: v.detach() for k, v in args.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd_scan(**detached)
    detached["x"].mul_(2)
    graph.replay()
    assert torch.equal(y, ssd_scan(**detached))


@pytest.mark.gpu
def test_step_in_a_cuda_graph(device):
    args = make(device, 1, (32, 32, 1, 1), batch=8, P=64, N=128, dtype=torch.bfloat16)
    args = {k: v.detach()[:, 0] if k in ("x", "dt", "B", "C") else v.detach() for k, v in args.items()}
    state = args.pop("initial_state")
    want_state = state.clone()
    ssd_step(state.clone(), **args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd_step(state, **args)
    state.copy_(want_state)
    for _ in range(3):
        graph.replay()
        want = ssd_step(want_state, **args, backend="torch")
        torch.testing.assert_close(y, want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
