"""The Triton kernels of causal_conv1d and causal_conv1d_step against the references in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import conv_reference as reference
from transpoint.kernels.conv import causal_conv1d, causal_conv1d_step

pytest.importorskip("triton")
from transpoint.kernels import conv_triton  # noqa: E402

# Of ||got - want|| / ||want||.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GPU = torch.cuda.is_available()
EXAMPLES = 25 if GPU else 10  # the former are compiled, the latter interpreted


def assert_near(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    distance = torch.linalg.vector_norm(got.double() - want)
    # A few numbers may be what is left of sums of numbers about 1, which are rounded to that size.
    scale = torch.linalg.vector_norm(want) + 0.3 * want.numel() ** 0.5
    assert distance <= tolerance * scale, f"{name}: relative error {distance / scale:.1e}"  # also false for NaN


def make(batch, length, channels, width, device, dtype=torch.float32, weight_dtype=None, margins=(0, 0)):
    """Random arguments; x is a view into a projection, with that many columns on its left and right."""
    g = torch.Generator(device).manual_seed(0)

    def random(*shape, dtype=weight_dtype or dtype):
        return torch.randn(shape, generator=g, device=device).to(dtype)

    left, right = margins
    x = random(batch, length, left + channels + right, dtype=dtype)
    args = dict(x=x[..., left : left + channels], weight=random(channels, width), bias=random(channels))
    args["initial_state"] = random(batch, channels, width - 1, dtype=dtype)
    return {name: t.detach().requires_grad_() for name, t in args.items()}


def check(args, tolerance=None, upstream=None, **options):
    """Compare values and all gradients of the kernels with the reference in float64."""
    tolerance = tolerance or TOLERANCE[args["x"].dtype]
    exact = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    got = causal_conv1d(**args, **options, return_final_state=True, backend="triton")
    want = reference.causal_conv1d(**exact, **options, return_final_state=True)
    assert got[0].dtype == got[1].dtype == args["x"].dtype
    for name, a, b in zip(("y", "state"), got, want, strict=True):
        assert_near(a.detach(), b.detach(), tolerance, name)
    if upstream is None:
        g = torch.Generator(got[0].device).manual_seed(1)
        upstream = [torch.randn(t.shape, generator=g, device=t.device).to(t.dtype) for t in got]
    got = torch.autograd.grad(got, list(args.values()), upstream, materialize_grads=True)
    want = torch.autograd.grad(want, list(exact.values()), [t.double() for t in upstream], materialize_grads=True)
    for name, a, b in zip(args, got, want, strict=True):
        assert a.dtype == args[name].dtype
        assert_near(a, b, tolerance, f"d{name}")


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_values_and_gradients(device, data):
    def draw(values):
        return data.draw(st.sampled_from(values))

    length, channels = draw([1, 2, 3, 4, 5, 9, 31, 70] if GPU else [1, 2, 3, 4, 5, 9, 20]), draw([1, 3, 8, 33, 64])
    dtype = draw([torch.float32, torch.float16, torch.bfloat16])
    args = make(
        draw([1, 2]),
        length,
        channels,
        width=draw([1, 2, 3, 4, 4, 4, 5, 8]),
        device=device,
        dtype=dtype,
        weight_dtype=draw([dtype, torch.float32]),
        margins=draw([(0, 0), (0, 1), (8, 8), (64, 64), (2, 6)]),
    )
    for name in ("bias", "initial_state"):
        if draw([True, False]):
            del args[name]
    seq_idx = None
    if draw([True, False]):
        documents = torch.randint(0, 3, (args["x"].shape[0], length), generator=torch.Generator().manual_seed(length))
        seq_idx = documents.to(device, draw([torch.int64, torch.int32])).sort(1 if draw([True, False]) else 0)[0]
    # Several rounds of a loop, and several programs along L, also for few tokens.
    small = draw([{}, {"warps": 1, "block_c": 32, "per_sm": 1, "steps": draw([2, 4])}])
    with mock.patch.dict(conv_triton.FORWARD, small), mock.patch.dict(conv_triton.BACKWARD, small):
        check(args, activation=draw([None, "silu"]), seq_idx=seq_idx)


@pytest.mark.parametrize("name", ["x", "dy", "seq_idx", "weight"])
def test_any_strides(device, name):
    args = make(2, 9, 16, 4, device)
    options = dict(activation="silu", seq_idx=torch.tensor([0] * 4 + [1] * 5, device=device).expand(2, -1))
    upstream = None
    if name == "x":
        args["x"] = args["x"].detach().mT.contiguous().mT.requires_grad_()
    elif name == "dy":
        upstream = [torch.ones((), device=device).expand(2, 9, 16), torch.ones((), device=device).expand(2, 16, 3)]
    elif name == "seq_idx":
        options["seq_idx"] = options["seq_idx"].mT.contiguous().mT
    else:
        args["weight"] = args["weight"].detach().mT.contiguous().mT.requires_grad_()
    check(args, upstream=upstream, **options)


def test_a_document_value_that_comes_back_is_another_document(device):
    args = make(1, 6, 8, 4, device)
    check(args, activation="silu", seq_idx=torch.tensor([[0, 1, 0, 0, 1, 0]], device=device))


def test_no_sequences(device):
    args = make(0, 5, 8, 4, device)
    y, state = causal_conv1d(**args, return_final_state=True, backend="triton")
    assert y.shape == (0, 5, 8) and state.shape == (0, 8, 3)
    y.sum().backward()
    assert not args["weight"].grad.any()


@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_steps(device, data):
    def draw(values):
        return data.draw(st.sampled_from(values))

    batch, channels, width = draw([1, 3]), draw([1, 8, 33, 300]), draw([1, 2, 4, 8])
    dtype = draw([torch.float32, torch.float16, torch.bfloat16])
    args = {
        k: v.detach()
        for k, v in make(batch, 3, channels, width, device, dtype, torch.float32, draw([(0, 0), (8, 9)])).items()
    }
    bias = args["bias"] if draw([True, False]) else None
    state = args["initial_state"].to(draw([dtype, torch.float32]))
    if draw([True, False]):
        state = state.mT.contiguous().mT
    activation = draw([None, "silu"])
    exact = state.double()
    for t in range(3):
        x = args["x"][:, t]
        y = causal_conv1d_step(x, state, args["weight"], bias, activation=activation, backend="triton")
        want = reference.causal_conv1d_step(
            x.double(), exact, args["weight"].double(), None if bias is None else bias.double(), activation=activation
        )
        assert y.dtype == dtype
        assert_near(y, want, TOLERANCE[dtype], "y")
        assert torch.equal(state.double(), exact)


@pytest.mark.slow
def test_registered_operators(device):
    args = {k: v.detach() for k, v in make(2, 5, 8, 2, device).items()}
    x, weight, bias, initial = args.values()
    seq_idx = torch.tensor([[0, 0, 0, 1, 1]], device=device).expand(2, -1)
    operators = torch.ops.transpoint
    plain = ("test_schema", "test_autograd_registration", "test_faketensor")
    for optional in ((None, None, None), (bias, seq_idx, initial)):
        inputs = (x, weight, *optional, True)
        torch.library.opcheck(operators.causal_conv1d_backward.default, (x, *inputs), test_utils=plain)
        inputs = tuple(t.requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs)
        torch.library.opcheck(operators.causal_conv1d.default, inputs)
    inputs = (x[:, 0].detach(), initial.detach().clone(), weight.detach(), None, True)
    torch.library.opcheck(operators.causal_conv1d_step.default, inputs)


def test_compiles_without_graph_breaks(device):
    def layer(x, weight, bias, initial_state):
        y, state = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=initial_state, return_final_state=True, backend="triton"
        )
        with torch.no_grad():
            step = causal_conv1d_step(x[:, 0], state.detach().clone(), weight, bias, backend="triton")
        return y + step.unsqueeze(1), state

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    args = make(2, 9, 8, 4, device)
    got, want = compiled(**args), layer(**args)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        *(torch.autograd.grad([t.sum() for t in o], list(args.values())) for o in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", [False, True])
def test_second_derivatives_are_refused(device, operator):
    args = make(1, 5, 8, 4, device)
    if operator:
        y = torch.ops.transpoint.causal_conv1d(*(args[k] for k in ("x", "weight", "bias")), None, None, True)
    else:
        y = causal_conv1d(args["x"], args["weight"], args["bias"], activation="silu", backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), args["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once|once_differentiable"):
        dx.sum().backward()


def test_what_the_kernels_cannot_do(device):
    args = {k: v.detach() for k, v in make(1, 5, 8, 9, device).items()}
    with pytest.raises(ValueError, match=r'^backend: "triton" cannot run here: W is at most 8, got 9;'):
        causal_conv1d(**args, backend="triton")
    assert torch.equal(causal_conv1d(**args), reference.causal_conv1d(**args))
    args = {k: v.detach().double() for k, v in make(1, 5, 8, 4, device).items()}
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 and float32, got torch.float64"):
        causal_conv1d(**args, backend="triton")
    assert torch.equal(causal_conv1d(**args), reference.causal_conv1d(**args))
    with pytest.raises(ValueError, match="W is at most 8, got 9"):
        shapes = (1, 2), (1, 2, 8), (2, 9)
        causal_conv1d_step(*(torch.zeros(shape, device=device) for shape in shapes), backend="triton")
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        causal_conv1d(args["x"][0], args["weight"], backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "width", "margins"),
    [
        ((8, 4096, 2304), 4, (0, 0)),
        ((8, 2048, 960), 4, (576, 9)),
        ((8, 2048, 960), 4, (576, 8)),
        ((1, 65536, 576), 4, (8, 8)),
        ((3, 1000, 200), 8, (0, 0)),
        ((2, 777, 1000), 2, (0, 0)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_real_shapes(device, shape, width, margins, packed, dtype):
    args = make(*shape, width, device, dtype, torch.float32, margins)
    seq_idx = None
    if packed:
        seq_idx = (torch.rand(shape[:2], device=device) < 0.01).cumsum(1)
    else:
        del args["initial_state"]
    check(args, {torch.float32: 1e-4}.get(dtype, TOLERANCE[dtype]), activation="silu", seq_idx=seq_idx)


@pytest.mark.gpu
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("vec", [4, 8])
def test_other_launch_parameters(device, stages, warps, vec):
    args = make(2, 4096, 768, 4, device, torch.bfloat16, torch.float32)
    other = dict(stages=stages, warps=warps, vec=vec, per_sm=1)
    with mock.patch.dict(conv_triton.FORWARD, other), mock.patch.dict(conv_triton.BACKWARD, other):
        check(args, activation="silu")


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    wide = torch.empty(2, 131072, 8704, device=device, dtype=torch.bfloat16)  # 2.3e9 elements
    x = wide[..., -64:].normal_().requires_grad_()
    args = dict(make(1, 1, 64, 4, device, torch.float32), x=x)
    del args["initial_state"]
    check(args, TOLERANCE[torch.bfloat16], activation="silu")


@pytest.mark.gpu
def test_step_in_a_graph(device):
    args = {k: v.detach() for k, v in make(64, 4, 2304, 4, device, torch.bfloat16, torch.float32).items()}
    x, state = args["x"][:, 0].clone(), args["initial_state"].clone()

    def step(state):
        return causal_conv1d_step(x, state, args["weight"], args["bias"], activation="silu", backend="triton")

    step(state.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(state)
    expected_state = args["initial_state"].clone()
    for t in range(4):
        x.copy_(args["x"][:, t])
        graph.replay()
        assert torch.equal(y, step(expected_state))
        assert torch.equal(state, expected_state)
