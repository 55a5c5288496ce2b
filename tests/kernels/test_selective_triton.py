"""The Triton kernels of the selective scan against the float64 reference: compiled on a GPU, else interpreted."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import selective_reference as reference
from transpoint.kernels.selective import selective_scan, selective_step

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative L2 error: nothing but inputs and outputs is rounded, and the states that gradients start from.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# (d, Gb, Gc): one group, as in the paper, what a converted teacher has, and groups of B across groups of C.
GROUPINGS = [(6, 1, 1), (8, 2, 4), (6, 2, 3)]
CASES = [(GROUPINGS[1], 2, DTYPES[1]), (GROUPINGS[2], 2, DTYPES[2])]
TOKENS = ("x", "dt", "B", "C")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """What is interpreted takes long for each token that is walked, also past the end."""
    from transpoint.kernels import selective_triton

    if not GPU:
        monkeypatch.setattr(selective_triton, "CHUNK", 2)


def slow(case):
    return pytest.param(*case, marks=pytest.mark.slow)


def make(device, length, grouping=(6, 1, 1), batch=1, N=4, dtype=torch.float32, seed=0):
    """Random arguments of selective_scan as a dict of leaves that require grad."""
    channels, gb, gc = grouping
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    found = dict(
        x=normal(batch, length, channels).to(dtype),
        dt=normal(batch, length, channels).to(dtype),
        A=-normal(channels, N).exp(),
        B=normal(batch, length, gb, N).to(dtype),
        C=normal(batch, length, gc, N).to(dtype),
        D=normal(channels),
        dt_bias=normal(channels) - 2,
        initial_state=normal(batch, channels, N),
    )
    return {name: t.to(device).requires_grad_() for name, t in found.items()}


def documents(device, batch, length, seed=0, count=3):
    """About `count` documents in each row; a later one may have the number of an earlier one."""
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < count / length
    return (ends.long().cumsum(1) % 2).to(device)


def with_gradients(function, args, **options):
    """Outputs and the gradients of a fixed random combination of y and the final state."""
    y, state = function(**args, **options, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in (y, state)]
    grads = torch.autograd.grad([y, state], list(args.values()), weights)
    return {"y": y, "state": state, **{f"d{name}": grad for name, grad in zip(args, grads, strict=True)}}


def assert_close(args, tolerance, **options):
    got = with_gradients(selective_scan, args, backend="triton", **options)
    double = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    want = with_gradients(reference.selective_scan, double, **options)
    for name in want:
        assert got[name].dtype == (args[name[1:]] if name[1:] in args else got[name]).dtype
        assert got[name].isfinite().all(), name
        scale = want[name].norm() if want[name].any() else 1.0
        error = (got[name].double() - want[name]).norm() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("grouping, N, dtype", [(GROUPINGS[0], 3, DTYPES[0]), *map(slow, CASES)], ids=str)
def test_values_and_gradients_for_every_grouping(device, grouping, N, dtype):
    assert_close(make(device, 5, grouping, N=N, dtype=dtype), TOLERANCE[dtype], seq_idx=documents(device, 1, 5))


@pytest.mark.slow
@settings(deadline=None, max_examples=3 if not GPU else 60)
@given(data=st.data())
def test_any_shape_dtype_decay_and_documents(device, data):
    length = data.draw(st.integers(1, 150 if GPU else 6), "length")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    grouping, N = data.draw(st.sampled_from(GROUPINGS), "grouping"), data.draw(st.sampled_from([1, 3, 4]))
    args = make(device, length, grouping, N=N, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    with torch.no_grad():
        args["A"].mul_(data.draw(st.sampled_from([1e-3, 1.0, 10.0]), "decay"))
    for name in ("initial_state", "D", "dt_bias"):
        if data.draw(st.booleans(), f"no {name}"):
            del args[name]
    options = {"seq_idx": documents(device, 1, length)} if data.draw(st.booleans(), "documents") else {}
    assert_close(args, TOLERANCE[dtype], **options)


def test_strong_decay_is_finite_and_accurate(device):
    args = make(device, 7, (2, 1, 1), N=2)
    with torch.no_grad():
        args["A"].copy_(torch.tensor([[-0.01, -300.0], [-1e4, 0.0]], device=device))
    assert_close(args, 1e-4)


@pytest.mark.slow
def test_sums_of_several_programs_of_a_group_are_added_up(device, monkeypatch):
    from transpoint.kernels import selective_triton

    monkeypatch.setattr(selective_triton, "BACKWARD", (1, 2))
    assert_close(make(device, 5, (10, 1, 2), N=2), TOLERANCE[torch.float32])


def test_padding_steps_leave_the_state_as_it_is(device):
    args = make(device, 7, (2, 1, 1), N=2)
    with torch.no_grad():
        args["dt"][:, 3:] = -1e4
    short = {name: t[:, :3] if name in TOKENS else t for name, t in args.items()}
    _, padded = selective_scan(**args, return_final_state=True, backend="triton")
    _, state = selective_scan(**short, return_final_state=True, backend="triton")
    assert torch.equal(padded, state)
    dx, dB = torch.autograd.grad(padded.sum(), [args["x"], args["B"]])
    assert not dx[:, 3:].any() and not dB[:, 3:].any() and dx[:, :3].all()


def test_views_of_one_wide_projection_and_steps_as_they_are(device):
    args = {name: t.detach() for name, t in make(device, 3, (2, 1, 2), N=2).items()}
    args["dt"].abs_()
    del args["dt_bias"]
    parts = [args[name].flatten(2) for name in TOKENS]
    wide = torch.cat([torch.full_like(parts[0], torch.nan), *parts], -1)
    _, *views = wide.split([2, *(part.shape[-1] for part in parts)], -1)
    views = {name: view.unflatten(2, args[name].shape[2:]) for name, view in zip(TOKENS, views, strict=True)}
    got = selective_scan(**{**args, **views}, dt_softplus=False, backend="triton")
    assert torch.equal(got, selective_scan(**args, dt_softplus=False, backend="triton"))
    torch.testing.assert_close(got, selective_scan(**args, dt_softplus=False, backend="torch"), rtol=1e-5, atol=1e-5)
    # A last dimension that is not contiguous is copied.
    for name in ("B", "A"):
        args[name] = args[name].mT.contiguous().mT
    assert torch.equal(got, selective_scan(**args, dt_softplus=False, backend="triton"))


def test_gradient_of_the_final_state_alone_and_of_y_alone(device):
    args = make(device, 5, (2, 1, 1), N=2)
    double = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    names = ["x", "dt", "A", "B", "dt_bias", "initial_state"]  # the final state does not depend on C and D
    for index in (0, 1):
        got = selective_scan(**args, return_final_state=True, backend="triton")[index]
        want = reference.selective_scan(**double, return_final_state=True)[index]
        for name, a, b in zip(
            names,
            torch.autograd.grad(got.square().sum(), [args[name] for name in names]),
            torch.autograd.grad(want.square().sum(), [double[name] for name in names]),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_some_inputs_without_gradient(device):
    args = make(device, 5, (2, 1, 1), N=2)
    want = with_gradients(selective_scan, args, backend="triton")
    for name in ("x", "initial_state", "A"):
        args[name].requires_grad_(False)
    y, state = selective_scan(**args, return_final_state=True, backend="triton")
    torch.testing.assert_close(y, want["y"])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(device) for t in (y, state)]
    (dB,) = torch.autograd.grad([y, state], [args["B"]], weights)
    torch.testing.assert_close(dB, want["dB"])


def test_second_derivatives_are_refused(device):
    args = make(device, 4, (1, 1, 1), N=2)
    y = selective_scan(**args, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), [args["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="^selective_scan: differentiable once only"):
        dx.sum().backward()


@pytest.mark.slow
def test_custom_ops_keep_their_contracts(device):
    from transpoint.kernels import selective_step_triton, selective_triton

    args = make(device, 3, (2, 1, 2), N=2)
    *inputs, state = args.values()
    every = (*inputs, documents(device, 1, 3), state)
    torch.library.opcheck(selective_triton.selective_scan.op, (*every, True, True, True))
    fewest = (*(t.detach() for t in inputs[:5]), None, None, None, None)
    torch.library.opcheck(selective_triton.selective_scan.op, (*fewest, False, False, False))
    token = [t.detach()[:, 0] if name in TOKENS else t.detach() for name, t in args.items()]
    *inputs, state = token
    torch.library.opcheck(selective_step_triton.selective_step.op, (state.clone(), *inputs, True))


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_reference(device, grouping, state_dtype):
    args = {name: t.detach() for name, t in make(device, 3, grouping, batch=2, N=24).items()}
    state = args.pop("initial_state").to(state_dtype)
    want_state = state.clone()
    for t in range(3):
        token = {name: tensor[:, t] if name in TOKENS else tensor for name, tensor in args.items()}
        if t == 2:
            token |= {"D": None, "dt_bias": None}
        want = selective_step(want_state, **token, backend="torch")
        torch.testing.assert_close(selective_step(state, **token, backend="triton"), want, rtol=1e-4, atol=1e-5)
        tolerance = 2e-2 if state_dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(state, want_state, rtol=tolerance, atol=tolerance)
        want_state.copy_(state)


def test_step_in_a_slice_of_a_larger_cache(device):
    args = {name: t.detach() for name, t in make(device, 1, batch=2).items()}
    state, token = args.pop("initial_state"), {n: t[:, 0] if n in TOKENS else t for n, t in args.items()}
    cache = torch.full((5, *state.shape[1:]), torch.nan, device=device)
    cache[2:4] = state
    want = selective_step(state, **token, backend="triton")
    assert torch.equal(selective_step(cache[2:4], **token, backend="triton"), want)
    assert torch.equal(cache[2:4], state) and cache[[0, 1, 4]].isnan().all()


def test_what_the_kernels_cannot_do_is_said(device):
    args = {name: t.detach() for name, t in make(device, 4).items()}
    with pytest.raises(ValueError, match='^backend: "triton" cannot run here: the kernels take float16, bfloat16 and'):
        selective_scan(**{name: t.double() for name, t in args.items()}, backend="triton")
    with pytest.raises(ValueError, match="^backend: .* takes a state that is contiguous along N, and not float64; use"):
        token = {name: t[:, 0] if name in TOKENS else t for name, t in args.items()}
        selective_step(token.pop("initial_state").double(), **token, backend="triton")
    large = {name: t.detach() for name, t in make(device, 2, (1, 1, 1), N=130).items()}
    with pytest.raises(ValueError, match="^backend: .* a state of at most 128, got 130; use"):
        selective_scan(**large, backend="triton")
    torch.testing.assert_close(selective_scan(**large), selective_scan(**large, backend="torch"))
    with pytest.raises(ValueError, match="^B: expected a number of groups that divides d = 6, got 4$"):
        selective_scan(**{**args, "B": torch.zeros(1, 4, 4, 4, device=device)}, backend="triton")


# Real shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [16, 64, 96, 128])
@pytest.mark.parametrize("grouping", [(512, 1, 1), (576, 3, 9), (160, 2, 2)], ids=str)
def test_real_shapes(device, grouping, N, dtype):
    args = make(device, 700, grouping, batch=2, N=N, dtype=dtype)
    assert_close(args, {torch.float32: 1e-4}.get(dtype, 2e-2), seq_idx=documents(device, 2, 700, seed=N))


@pytest.mark.gpu
@pytest.mark.parametrize("N", [16, 64])
@pytest.mark.parametrize("decay", [1e-3, 1.0])
def test_long_sequences_in_bfloat16(device, N, decay):
    args = make(device, 4096, (256, 1, 4), N=N, dtype=torch.bfloat16)
    with torch.no_grad():
        args["A"].mul_(decay)
    assert_close(args, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("N", [16, 64, 128])
def test_every_run_gives_the_same_bits(device, N):
    """Nothing is added up in an order that varies: what differs is a race."""
    args = make(device, 1000, (512, 2, 8), batch=2, N=N, dtype=torch.bfloat16)
    first = with_gradients(selective_scan, args, backend="triton")
    for _ in range(10):
        again = with_gradients(selective_scan, args, backend="triton")
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.gpu
def test_compiles_without_graph_breaks_and_runs_in_a_cuda_graph(device):
    args = make(device, 300, (256, 1, 4), N=64, dtype=torch.bfloat16)

    def loss(**args):
        y, state = selective_scan(**args, return_final_state=True)
        return y.float().square().mean() + state.square().mean()

    want = torch.autograd.grad(loss(**args), list(args.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**args), list(args.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)

    detached = {name: t.detach() for name, t in args.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan(**detached)
    detached["x"].mul_(2)
    graph.replay()
    assert torch.equal(y, selective_scan(**detached))


@pytest.mark.gpu
def test_step_in_a_cuda_graph(device):
    args = {name: t.detach() for name, t in make(device, 1, (2048, 1, 32), batch=8, N=64).items()}
    state = args.pop("initial_state")
    token = {name: t[:, 0].bfloat16() if name in TOKENS else t for name, t in args.items()}
    want_state = state.clone()
    selective_step(state.clone(), **token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_step(state, **token)
    state.copy_(want_state)
    for _ in range(3):
        graph.replay()
        want = selective_step(want_state, **token, backend="torch")
        torch.testing.assert_close(y, want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
