"""gated_rms_norm against its definition, slice by slice."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels.norm import gated_rms_norm


def naive(x, weight, z, groups, eps):
    gated = x if z is None else x * z / (1 + torch.exp(-z))
    slices = gated.split(x.shape[-1] // groups, -1)
    normed = [s / torch.sqrt((s * s).sum(-1, keepdim=True) / s.shape[-1] + eps) for s in slices]
    return torch.cat(normed, -1) * weight


@settings(deadline=None, max_examples=30)
@given(
    leading=st.lists(st.integers(1, 3), max_size=3),
    groups=st.integers(1, 4),
    size=st.integers(1, 5),
    gate=st.booleans(),
    eps=st.sampled_from([1e-6, 0.5]),
)
def test_values_and_gradients(leading, groups, size, gate, eps):
    g = torch.Generator().manual_seed(0)
    shapes = [(*leading, groups * size), (groups * size,), (*leading, groups * size)][: 3 if gate else 2]
    args = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    x, weight, z = args if gate else (*args, None)
    got = gated_rms_norm(x, weight, z, groups=groups, eps=eps)
    want = naive(x, weight, z, groups, eps)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(got.shape, generator=g, dtype=torch.float64)
    for grad, wanted in zip(
        torch.autograd.grad(got, args, upstream), torch.autograd.grad(want, args, upstream), strict=True
    ):
        torch.testing.assert_close(grad, wanted)


def test_gate_comes_before_the_norm():
    x, z, weight = torch.randn(4, 8), torch.full((4, 8), 3.0), torch.ones(8)
    # A constant gate is divided out again, up to eps; after the norm it would scale the result by silu(3) = 2.86.
    torch.testing.assert_close(gated_rms_norm(x, weight, z), gated_rms_norm(x, weight), rtol=1e-4, atol=1e-4)


def test_default_is_one_group_and_small_eps():
    x, weight = torch.randn(3, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(gated_rms_norm(x, weight), naive(x, weight, None, 1, 1e-6), rtol=1e-12, atol=0)


def test_bfloat16_is_rounded_once():
    x, z, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16(), torch.randn(8)
    y = gated_rms_norm(x, weight, z, groups=2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, gated_rms_norm(x.float(), weight, z.float(), groups=2).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=torch.ones(4)), r"^weight: expected shape \(C\) = \(6,\), got \(4,\)$"),
        (dict(weight=torch.ones(6), z=torch.ones(6)), r"^z: expected the shape of x, \(2, 6\), got \(6,\)$"),
        (dict(weight=torch.ones(6), groups=4), r"^groups: expected a divisor of C = 6, got 4$"),
        (dict(weight=torch.ones(6), groups=0), r"^groups: expected a divisor of C = 6, got 0$"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(torch.ones(2, 6), **arguments)
