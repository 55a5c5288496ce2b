"""s4d_scan and s4d_step against a token-by-token recurrence of complex numbers in float64."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels.s4d import s4d_scan, s4d_step


def recurrence(x, dt, A, C, D, initial_state, seq_idx=None):
    """The recurrence as it is defined; y (B, L, E) and the last state (B, E, 2 or 1, M)."""
    pairs = A.shape[1] == 2
    A, C, state = (torch.complex(*t.unbind(-2)) if pairs else t[..., 0, :] for t in (A, C, initial_state))
    decay = (dt[:, None] * A).exp()
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        state = decay * state + (decay - 1) / A * x[:, t, :, None]
        ys.append((C * state).sum(-1).real * (2 if pairs else 1) + D * x[:, t])
    return torch.stack(ys, 1), torch.stack((state.real, state.imag), -2) if pairs else state[..., None, :]


def make(length, parts=2, batch=2, channels=3, modes=4, dtype=torch.float64, seed=0):
    """Random arguments of s4d_scan as a dict of leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rates = torch.stack((-normal(channels, modes).exp(), 3 * normal(channels, modes)), 1)[:, :parts]
    found = dict(
        x=normal(batch, length, channels),
        dt=0.1 * normal(channels).exp(),
        A=rates.contiguous(),
        C=normal(channels, parts, modes),
        D=normal(channels),
        initial_state=normal(batch, channels, parts, modes),
    )
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


def with_gradients(y, state, args):
    """Outputs, and the gradients of a fixed random combination of them."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, state)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, state), weights, strict=True))
    return [y, state, *torch.autograd.grad(loss, list(args.values()))]


def documents(batch, length, seed, often=0.2):
    """Some documents in each row; a later one may have the number of an earlier one."""
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < often
    return ends.long().cumsum(1) % 2


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 150),
    parts=st.sampled_from([2, 1]),
    chunk_size=st.sampled_from([None, 1, 2, 16, 64]),
    packed=st.sampled_from([None, 0.02, 0.2, 0.8]),
    seed=st.integers(0, 10),
)
def test_it_is_the_recurrence_with_its_gradients(length, parts, chunk_size, packed, seed):
    args = make(length, parts, seed=seed)
    seq_idx = None if packed is None else documents(2, length, seed, packed)
    found = s4d_scan(**args, seq_idx=seq_idx, return_final_state=True, chunk_size=chunk_size)
    wanted = recurrence(**args, seq_idx=seq_idx)
    for a, b in zip(with_gradients(*found, args), with_gradients(*wanted, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert torch.equal(s4d_scan(**args, seq_idx=seq_idx, chunk_size=chunk_size), found[0])


@pytest.mark.parametrize("parts", [2, 1])
def test_it_goes_on_from_a_state_and_steps(parts):
    args = {name: t.detach() for name, t in make(100, parts).items()}
    x, start = args.pop("x"), args.pop("initial_state")
    whole, last = s4d_scan(x, **args, initial_state=start, return_final_state=True)
    first, state = s4d_scan(x[:, :77], **args, initial_state=start, return_final_state=True)
    second, end = s4d_scan(x[:, 77:], **args, initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)
    for length in (1, 9, 100):  # in one chunk and in several
        zeros = s4d_scan(x[:, :length], **args, initial_state=torch.zeros_like(start))
        assert torch.equal(s4d_scan(x[:, :length], **args), zeros)
    state = start.clone()
    ys = [s4d_step(state, x[:, t], **args) for t in range(100)]
    torch.testing.assert_close(torch.stack(ys, 1), whole)
    torch.testing.assert_close(state, last)


def test_nothing_of_another_document_enters_a_sum():
    """Not even what is not a number."""
    args = {name: t.detach() for name, t in make(130).items()}
    seq_idx = (torch.arange(130) >= 71).long().expand(2, -1)
    wanted, state = s4d_scan(**args, seq_idx=seq_idx, return_final_state=True)
    spoilt = args["x"].clone()
    spoilt[:, :71] = torch.nan
    found, last = s4d_scan(**{**args, "x": spoilt}, seq_idx=seq_idx, return_final_state=True)
    assert torch.equal(found[:, 71:], wanted[:, 71:]) and torch.equal(last, state)


def test_it_is_in_float32_whatever_it_is_given():
    args = {name: t.detach().float() for name, t in make(90).items()}
    args["x"] = args["x"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = s4d_scan(**args, return_final_state=True)
    wanted, last = s4d_scan(**{name: t.double() for name, t in args.items()}, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("half_life", [0.5, 4096.0])
def test_long_sequences_in_float32_are_near_float64(half_life):
    """With the modes of S4D-Lin, of which the fastest turn many times in a token or slowly through the sequence."""
    A = torch.stack((torch.full((1, 32), -0.5), torch.pi * torch.arange(32.0)[None]), 1)
    dt, C = torch.full((1,), 1.386 / half_life), torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 5000, 1, generator=torch.Generator().manual_seed(1))
    wanted = s4d_scan(x.double(), dt.double(), A.double(), C.double())
    found = s4d_scan(x, dt, A, C).double()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"x": (2, 9)}, r"x: expected shape \(B, L, E\), got \(2, 9\)"),
        ({"x": (2, 0, 3)}, "x: expected at least one token, got L = 0"),
        ({"A": (3, 4)}, r"A: expected shape \(E, 2 or 1, M\) with E = 3, got \(3, 4\)"),
        ({"A": (2, 2, 4)}, r"A: expected shape \(E, 2 or 1, M\) with E = 3, got \(2, 2, 4\)"),
        ({"A": (3, 4, 2)}, r"A: expected shape \(E, 2 or 1, M\) with E = 3, got \(3, 4, 2\)"),
        ({"C": (3, 1, 4)}, r"C: expected shape \(as A\) = \(3, 2, 4\), got \(3, 1, 4\)"),
        ({"dt": (1,)}, r"dt: expected shape \(E\) = \(3,\), got \(1,\)"),
        ({"D": (1,)}, r"D: expected shape \(E\) = \(3,\), got \(1,\)"),
        ({"initial_state": (2, 3, 8)}, r"state: expected shape \(B, E, 2 or 1, M\) = \(2, 3, 2, 4\), got"),
        ({"seq_idx": (9,)}, r"seq_idx: expected shape \(B, L\) = \(2, 9\), got \(9,\)"),
        ({"seq_idx": (2, 9)}, "seq_idx: expected integers, got torch.float32"),
        ({"chunk_size": 24}, "chunk_size: expected a power of two, got 24"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    given = {name: torch.zeros(value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=told):
        s4d_scan(**{**make(9), **given})


def test_a_state_of_another_shape_does_not_step():
    args = {name: t.detach() for name, t in make(1).items()}
    with pytest.raises(ValueError, match=r"state: expected shape \(B, E, 2 or 1, M\) = \(2, 3, 2, 4\), got"):
        s4d_step(args.pop("initial_state")[:1], args.pop("x")[:, 0], **args)
