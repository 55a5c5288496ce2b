"""The Triton kernels of gated_rms_norm against the reference in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels import norm_reference as reference
from transpoint.kernels.norm import gated_rms_norm

pytest.importorskip("triton")
from transpoint.kernels import norm_triton  # noqa: E402

# Of ||got - want|| / ||want||.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXAMPLES = 25 if torch.cuda.is_available() else 15  # where most of them are compiled


def assert_near(got, want, tolerance, name=""):
    assert got.shape == want.shape, name
    distance = torch.linalg.vector_norm(got.double() - want)
    scale = torch.linalg.vector_norm(want) + 1e-3 * want.numel() ** 0.5
    assert distance <= tolerance * scale, f"{name}: relative error {distance / scale:.1e}"  # also false for NaN


def make(leading, channels, device, dtype=torch.float32, weight_dtype=None, gate=True, margins=(0, 0)):
    """Random arguments; x and z are views into projections, with that many columns on their left and right."""
    g = torch.Generator(device).manual_seed(0)
    left, right = margins

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, device=device).to(dtype)

    def rows():
        return random(*leading, left + channels + right)[..., left : left + channels]

    args = dict(x=rows(), weight=random(channels, dtype=weight_dtype or dtype))
    if gate:
        args["z"] = rows()
    return {name: t.detach().requires_grad_() for name, t in args.items()}


def check(args, tolerance=None, upstream=None, **options):
    """Compare values and all gradients of the kernels with the reference in float64."""
    tolerance = tolerance or TOLERANCE[args["x"].dtype]
    exact = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    got = gated_rms_norm(**args, **options, backend="triton")
    want = reference.gated_rms_norm(**exact, **options)
    assert got.dtype == args["x"].dtype
    assert_near(got.detach(), want.detach(), tolerance, "y")
    if upstream is None:
        g = torch.Generator(got.device).manual_seed(1)
        upstream = torch.randn(got.shape, generator=g, device=got.device).to(got.dtype)
    got = torch.autograd.grad(got, list(args.values()), upstream)
    want = torch.autograd.grad(want, list(exact.values()), upstream.double())
    for name, a, b in zip(args, got, want, strict=True):
        assert a.dtype == args[name].dtype
        assert_near(a, b, tolerance, f"d{name}")


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_values_and_gradients(device, data):
    def draw(values):
        return data.draw(st.sampled_from(values))

    groups, size = draw([1, 2, 3, 6, 8, 9]), draw([2, 5, 8, 16, 20, 64])
    dtype = draw([torch.float32, torch.float16, torch.bfloat16])
    args = make(
        draw([(), (1,), (7,), (2, 3), (20,), (2, 1, 17)]),
        groups * size,
        device,
        dtype=dtype,
        weight_dtype=draw([dtype, torch.float32]),
        gate=draw([True, False]),
        margins=draw([(0, 0), (0, 1), (8, 8), (64, 64), (2, 6)]),
    )
    options = dict(groups=groups, eps=draw([1e-2, 0.5]))
    with mock.patch.dict(norm_triton.BACKWARD, warps=draw([1, 8]), reload=draw([True, False]), sm_warps=draw([1, 20])):
        check(args, **options)


@pytest.mark.parametrize("size", [1500, 2048, 5000])
def test_large_groups(device, size):
    check(make((3,), 2 * size, device), groups=2)


@pytest.mark.parametrize("name", ["x", "z", "dy", "weight"])
def test_any_strides(device, name):
    args, upstream = make((2, 9), 24, device), None
    if name == "dy":
        upstream = torch.ones((), device=device).expand(2, 9, 24)
    elif name == "weight":
        args["weight"] = torch.randn(48, device=device)[::2].requires_grad_()
    else:
        args[name] = args[name].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    check(args, upstream=upstream, groups=3)


def test_mixed_dtypes(device):
    args = make((5,), 64, device, torch.bfloat16, torch.float16)
    args["z"] = args["z"].detach().float().requires_grad_()
    check(args, groups=2)


def test_extreme_inputs(device):
    args = {k: v.detach() for k, v in make((4,), 64, device).items()}
    args["x"][0], args["z"][1], args["z"][2] = 0, 200, -200
    check({k: v.requires_grad_() for k, v in args.items()}, groups=2, eps=1e-5)


def test_registered_operators(device):
    args = {k: v.detach() for k, v in make((2, 5), 16, device).items()}
    x, weight, z = args.values()
    operators = torch.ops.transpoint
    plain = ("test_schema", "test_autograd_registration", "test_faketensor")
    for gate in (None, z):
        inputs = (x, weight, gate, 2, 1e-5)
        torch.library.opcheck(operators.gated_rms_norm_backward.default, (x, *inputs), test_utils=plain)
        inputs = tuple(t.requires_grad_() if torch.is_tensor(t) else t for t in inputs)
        torch.library.opcheck(operators.gated_rms_norm.default, inputs)


def test_compiles_without_graph_breaks(device):
    def layer(x, weight, z):
        return gated_rms_norm(x * 2, weight, z, groups=2, backend="triton") + 1

    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    args = make((2, 9), 16, device)
    got, want = compiled(**args), layer(**args)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sum(), list(args.values())) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operator", [False, True])
def test_second_derivatives_are_refused(device, operator):
    x, weight, z = make((5,), 16, device).values()
    if operator:
        y = torch.ops.transpoint.gated_rms_norm(x, weight, z, 2, 1e-6)
    else:
        y = gated_rms_norm(x, weight, z, groups=2, backend="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once|once_differentiable"):
        dx.sum().backward()


def test_what_the_kernels_cannot_do(device):
    x, weight = torch.randn(2, 6, device=device), torch.randn(6, device=device)
    with pytest.raises(ValueError, match="the kernels take float16, bfloat16 and float32, got torch.float64"):
        gated_rms_norm(x.double(), weight, backend="triton")
    assert torch.equal(gated_rms_norm(x.double(), weight), reference.gated_rms_norm(x.double(), weight))
    with pytest.raises(ValueError, match="a group has at most 16384 channels, got 16385"):
        gated_rms_norm(torch.ones(1, 16385, device=device), torch.ones(16385, device=device), backend="triton")
    with pytest.raises(ValueError, match="x is empty"):
        gated_rms_norm(x[:0], weight, backend="triton")
    assert gated_rms_norm(x[:0], weight).shape == (0, 6)
    with pytest.raises(ValueError, match="^groups: expected a divisor of C = 6, got 4$"):
        gated_rms_norm(x, weight, groups=4, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "channels", "groups", "margins"),
    [
        (32768, 2048, 1, (0, 0)),
        (32768, 2048, 32, (0, 0)),
        (16384, 576, 9, (0, 0)),
        (16384, 576, 9, (0, 969)),
        (4099, 4096, 1, (0, 0)),
        (1000, 8192, 1, (0, 0)),
        (500, 16384, 1, (0, 0)),
        (3000, 1200, 12, (8, 8)),
        (777, 3000, 1, (0, 0)),
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_real_shapes(device, rows, channels, groups, gate, margins, dtype):
    args = make((rows,), channels, device, dtype, torch.float32, gate, margins)
    check(args, {torch.float32: 1e-4}.get(dtype, TOLERANCE[dtype]), groups=groups)


@pytest.mark.gpu
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("reload", [True, False])
@pytest.mark.parametrize("groups", [1, 12])
def test_other_launch_parameters(device, stages, warps, reload, groups):
    args = make((5000,), 768, device, torch.bfloat16, torch.float32)
    with mock.patch.dict(norm_triton.BACKWARD, stages=stages, warps=warps, reload=reload):
        check(args, groups=groups)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    wide = torch.empty(270000, 8192, device=device, dtype=torch.bfloat16)  # 2.2e9 elements
    x, z = (wide[:, i : i + 64].normal_().requires_grad_() for i in (0, 8128))
    check(dict(x=x, weight=torch.randn(64, device=device, requires_grad=True), z=z))
