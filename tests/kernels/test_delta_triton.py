"""The Triton kernels of the gated delta rule against the float64 reference: compiled on a GPU, else interpreted."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from transpoint.kernels import delta_reference as reference
from transpoint.kernels.delta import delta_scan, delta_step

GPU = torch.cuda.is_available()
# Triton's interpreter multiplies bfloat16 matrices wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# Relative L2 error; float32 products are sums of three in TF32.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# (H, Hq, Hk, Hv): nothing shared, what Qwen3-Next has, what attention with shared keys and values has, and another.
GROUPINGS = [(2, 2, 2, 2), (4, 2, 2, 4), (6, 6, 2, 2), (4, 4, 1, 2)]
TOKENS = ("q", "k", "v", "g", "beta")


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


def make(device, length, grouping=(4, 2, 2, 4), batch=1, P=16, N=16, dtype=torch.float32, seed=0):
    """Random arguments of delta_scan as a dict of leaves that require grad."""
    heads, hq, hk, hv = grouping
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    found = dict(
        q=F.normalize(normal(batch, length, hq, N), dim=-1).to(dtype),
        k=F.normalize(normal(batch, length, hk, N), dim=-1).to(dtype),
        v=normal(batch, length, hv, P).to(dtype),
        g=-0.2 * normal(batch, length, heads).exp(),
        beta=normal(batch, length, heads).sigmoid(),
        initial_state=normal(batch, heads, P, N),
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
    got = with_gradients(delta_scan, args, backend="triton", **options)
    double = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    want = with_gradients(reference.delta_scan, double, seq_idx=options.get("seq_idx"))
    for name in want:
        assert got[name].dtype == (args[name[1:]] if name[1:] in args else got[name]).dtype
        assert got[name].isfinite().all(), name
        scale = want[name].norm() if want[name].any() else 1.0
        error = (got[name].double() - want[name]).norm() / scale
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("grouping", [GROUPINGS[1], *map(slow, (GROUPINGS[0], GROUPINGS[2]))], ids=str)
def test_values_and_gradients_for_every_head_grouping(device, grouping):
    dtype = torch.float16 if grouping[0] == 6 else torch.float32
    args = make(device, 37, grouping, batch=2 if grouping[0] == 2 else 1, dtype=dtype)
    packed = documents(device, 1, 37).expand(len(args["q"]), -1)
    assert_close(args, TOLERANCE[dtype], seq_idx=packed, chunk_size=16)


@pytest.mark.slow
@settings(deadline=None, max_examples=5 if not GPU else 60)
@given(data=st.data())
def test_any_shape_dtype_decay_and_documents(device, data):
    length = data.draw(st.integers(1, 150 if GPU else 40), "length")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    grouping = data.draw(st.sampled_from(GROUPINGS), "grouping")
    P, N = data.draw(st.sampled_from([8, 16, 20, 32])), data.draw(st.sampled_from([8, 16, 24, 32]))
    args = make(device, length, grouping, P=P, N=N, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    with torch.no_grad():
        args["g"].mul_(data.draw(st.sampled_from([1e-3, 1.0, 10.0]), "decay"))
    if data.draw(st.booleans(), "no initial state"):
        del args["initial_state"]
    options = {"seq_idx": documents(device, 1, length)} if data.draw(st.booleans(), "documents") else {}
    assert_close(args, TOLERANCE[dtype], **options, chunk_size=data.draw(st.sampled_from([16, 32, None])))


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_keys_that_repeat_are_written_over(device, decay):
    """Powers of the triangular system then reach 1e17, where its inverse has numbers of size 1."""
    args = make(device, 64, (1, 1, 1, 1))
    with torch.no_grad():
        args["k"].copy_(args["k"][:, :1].clone())
        args["beta"].fill_(0.999)
        args["g"].fill_(-decay)
    assert_close(args, TOLERANCE[torch.float32])


@pytest.mark.parametrize("erasing", [1, 2])
def test_strong_decay_is_finite_and_accurate(device, erasing):
    args = make(device, 70, (1, 1, 1, 1))
    with torch.no_grad():
        args["g"].fill_(-0.016)
        args["g"][:, ::erasing] = -64  # tokens that erase the state, at 2 between tokens that keep it
    assert_close(args, 1e-3)


def test_head_dim_larger_than_registers_goes_in_blocks(device):
    assert_close(make(device, 17, (1, 1, 1, 1), P=80), TOLERANCE[torch.float32], chunk_size=16)


def test_blocks_are_small_where_walks_are_few(device, monkeypatch):
    from transpoint.kernels import delta_triton

    args = {name: t.detach() for name, t in make(device, 17, (1, 1, 1, 1), P=40).items()}
    want = delta_scan(**args, return_final_state=True, chunk_size=16, backend="triton")
    monkeypatch.setattr(delta_triton, "sm_count", lambda device: 100)
    got = delta_scan(**args, return_final_state=True, chunk_size=16, backend="triton")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_padding_steps_leave_the_state_as_it_is(device):
    args = make(device, 24, (2, 1, 1, 2))
    with torch.no_grad():
        args["g"][:, 17:] = 0
        args["beta"][:, 17:] = 0
    short = {name: t[:, :17] if name in TOKENS else t for name, t in args.items()}
    _, padded = delta_scan(**args, return_final_state=True, chunk_size=16, backend="triton")
    _, state = delta_scan(**short, return_final_state=True, chunk_size=16, backend="triton")
    assert torch.equal(padded, state)
    dk, dv = torch.autograd.grad(padded.sum(), [args["k"], args["v"]])
    assert not dk[:, 17:].any() and not dv[:, 17:].any()


def test_views_of_one_wide_projection(device):
    args = {name: t.detach() for name, t in make(device, 20).items()}
    parts = [args[name].flatten(2) for name in TOKENS]
    wide = torch.cat([torch.full_like(parts[0], torch.nan), *parts], -1)
    _, *views = wide.split([32, *(part.shape[-1] for part in parts)], -1)
    views = {name: view.unflatten(2, args[name].shape[2:]) for name, view in zip(TOKENS, views, strict=True)}
    got = delta_scan(**{**args, **views}, chunk_size=16, backend="triton")
    assert torch.equal(got, delta_scan(**args, chunk_size=16, backend="triton"))
    # A last dimension that is not contiguous is copied.
    for name in ("q", "initial_state"):
        args[name] = args[name].mT.contiguous().mT
    assert torch.equal(got, delta_scan(**args, chunk_size=16, backend="triton"))


def test_gradient_of_the_final_state_alone_and_of_y_alone(device):
    args = make(device, 20, (2, 1, 1, 2))
    double = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    names = ["k", "v", "g", "beta", "initial_state"]  # the final state does not depend on q
    for index in (0, 1):
        got = delta_scan(**args, return_final_state=True, chunk_size=16, backend="triton")[index]
        want = reference.delta_scan(**double, return_final_state=True)[index]
        for name, a, b in zip(
            names,
            torch.autograd.grad(got.square().sum(), [args[name] for name in names]),
            torch.autograd.grad(want.square().sum(), [double[name] for name in names]),
            strict=True,
        ):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_some_inputs_without_gradient(device):
    args = make(device, 16, (2, 1, 1, 2))
    want = with_gradients(delta_scan, args, chunk_size=16, backend="triton")
    for name in ("v", "initial_state", "g"):
        args[name].requires_grad_(False)
    y, state = delta_scan(**args, return_final_state=True, chunk_size=16, backend="triton")
    torch.testing.assert_close(y, want["y"])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(device) for t in (y, state)]
    (dk,) = torch.autograd.grad([y, state], [args["k"]], weights)
    torch.testing.assert_close(dk, want["dk"])


def test_mixed_dtypes_are_promoted(device):
    args = {name: t.detach() for name, t in make(device, 17, (2, 1, 1, 2)).items()}
    half = {**args, "v": args["v"].half()}
    y = delta_scan(**half, chunk_size=16, backend="triton")
    assert y.dtype == torch.float16
    want = delta_scan(**{**args, "v": half["v"].float()}, chunk_size=16, backend="triton")
    torch.testing.assert_close(y, want.half())


def test_second_derivatives_are_refused(device):
    args = make(device, 8, (1, 1, 1, 1))
    y = delta_scan(**args, chunk_size=16, backend="triton")
    (dv,) = torch.autograd.grad(y.square().sum(), [args["v"]], create_graph=True)
    with pytest.raises(RuntimeError, match="^delta_scan: differentiable once only"):
        dv.sum().backward()


@pytest.mark.slow
def test_custom_ops_keep_their_contracts(device):
    from transpoint.kernels import delta_step_triton, delta_triton

    args = make(device, 8, (2, 1, 1, 2), P=8, N=8)
    for training in (True, False):
        inputs = [t if training else t.detach() for t in args.values()]
        torch.library.opcheck(delta_triton.delta_scan.op, (*inputs, documents(device, 1, 8), True, 16, training))
    token = [args[name].detach()[:, 0] for name in TOKENS]
    torch.library.opcheck(delta_step_triton.delta_step.op, (args["initial_state"].detach().clone(), *token))


@pytest.mark.parametrize("grouping", GROUPINGS[1:3], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_reference(device, grouping, state_dtype):
    args = {name: t.detach() for name, t in make(device, 3, grouping, batch=2, P=20, N=24).items()}
    state = args.pop("initial_state").to(state_dtype)
    want_state = state.clone()
    for t in range(3):
        token = {name: tensor[:, t] for name, tensor in args.items()}
        want = delta_step(want_state, **token, backend="torch")
        torch.testing.assert_close(delta_step(state, **token, backend="triton"), want, rtol=1e-4, atol=1e-5)
        tolerance = 2e-2 if state_dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(state, want_state, rtol=tolerance, atol=tolerance)
        want_state.copy_(state)


def test_step_in_a_slice_of_a_larger_cache(device):
    args = {name: t.detach() for name, t in make(device, 1, batch=2).items()}
    state, token = args.pop("initial_state"), {name: t[:, 0] for name, t in args.items()}
    cache = torch.full((5, *state.shape[1:]), torch.nan, device=device)
    cache[2:4] = state
    want = delta_step(state, **token, backend="triton")
    assert torch.equal(delta_step(cache[2:4], **token, backend="triton"), want)
    assert torch.equal(cache[2:4], state) and cache[[0, 1, 4]].isnan().all()


def test_what_the_kernels_cannot_do_is_said(device):
    args = {name: t.detach() for name, t in make(device, 4).items()}
    with pytest.raises(ValueError, match='^backend: "triton" cannot run here: the kernels take float16, bfloat16 and'):
        delta_scan(**{name: t.double() for name, t in args.items()}, backend="triton")
    with pytest.raises(ValueError, match="^backend: .*: the kernels take no float64 keys or queries; use"):
        delta_scan(**{**args, "k": args["k"].double()}, backend="triton")
    with pytest.raises(ValueError, match="^backend: .* takes a state that is contiguous along N, and not float64; use"):
        token = {name: args[name][:, 0] for name in TOKENS}
        delta_step(args["initial_state"].double(), **token, backend="triton")
    large = {name: t.detach() for name, t in make(device, 4, (1, 1, 1, 1), N=300).items()}
    with pytest.raises(ValueError, match="^backend: .* keys of at most 256, or 128 in float32, got 300; use"):
        delta_scan(**large, backend="triton")
    torch.testing.assert_close(delta_scan(**large), delta_scan(**large, backend="torch"))
    with pytest.raises(ValueError, match="^v: expected a number of heads that divides H = 4, got 3$"):
        delta_scan(**{**args, "v": torch.zeros(1, 4, 3, 16, device=device)}, backend="triton")


# Real shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P, N", [(64, 64), (128, 128), (96, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("grouping", [(4, 4, 4, 4), (8, 4, 4, 8), (9, 9, 3, 3)], ids=str)
def test_real_shapes(device, grouping, P, N, dtype):
    if dtype == torch.float32 and N > 128:
        pytest.skip("the kernels take no such keys in float32")
    args = make(device, 700, grouping, batch=2, P=P, N=N, dtype=dtype)
    assert_close(args, {torch.float32: 1e-3}.get(dtype, 2e-2), seq_idx=documents(device, 2, 700, seed=N))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
def test_long_sequences_in_bfloat16(device, size, decay):
    args = make(device, 2048, (4, 2, 2, 4), P=size, N=size, dtype=torch.bfloat16)
    with torch.no_grad():
        args["g"].mul_(decay)
    assert_close(args, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_keys_at_the_real_size(device, dtype):
    args = make(device, 500, (2, 2, 2, 2), P=128, N=128, dtype=dtype)
    with torch.no_grad():
        args["k"].copy_(args["k"][:, :1].clone())
        args["beta"].fill_(0.99)
        args["g"].zero_()
    y = delta_scan(**args, backend="triton")
    want = reference.delta_scan(**{name: t.detach().double() for name, t in args.items()})
    assert (y.double() - want).norm() / want.norm() < {torch.float32: 1e-3}.get(dtype, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_every_run_gives_the_same_bits(device, size):
    """Nothing is added up in an order that varies: what differs is a race."""
    args = make(device, 2000, (8, 4, 4, 8), batch=2, P=size, N=size, dtype=torch.bfloat16)
    first = with_gradients(delta_scan, args, backend="triton")
    for _ in range(10):
        again = with_gradients(delta_scan, args, backend="triton")
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


@pytest.mark.gpu
def test_compiles_without_graph_breaks_and_runs_in_a_cuda_graph(device):
    args = make(device, 300, (8, 4, 4, 8), P=64, N=64, dtype=torch.bfloat16)

    def loss(**args):
        y, state = delta_scan(**args, return_final_state=True)
        return y.float().square().mean() + state.square().mean()

    want = torch.autograd.grad(loss(**args), list(args.values()))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(**args), list(args.values()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)

    detached = {name: t.detach() for name, t in args.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = delta_scan(**detached)
    detached["v"].mul_(2)
    graph.replay()
    assert torch.equal(y, delta_scan(**detached))


@pytest.mark.gpu
def test_step_in_a_cuda_graph(device):
    args = {name: t.detach() for name, t in make(device, 1, (32, 16, 16, 32), batch=8, P=128, N=128).items()}
    state, token = args.pop("initial_state"), {name: t[:, 0].bfloat16() for name, t in args.items()}
    want_state = state.clone()
    delta_step(state.clone(), **token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = delta_step(state, **token)
    state.copy_(want_state)
    for _ in range(3):
        graph.replay()
        want = delta_step(want_state, **token, backend="torch")
        torch.testing.assert_close(y, want, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
