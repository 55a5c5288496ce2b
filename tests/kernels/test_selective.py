"""selective_scan and selective_step against a token-by-token recurrence in float64, and against Mamba-2's scan."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from transpoint.kernels.selective_reference import PIECE, selective_scan, selective_step
from transpoint.kernels.ssd_reference import ssd_scan

# (d, Gb, Gc): one group, as in the paper, and what a converted teacher has.
GROUPINGS = [(6, 1, 1), (12, 2, 4), (6, 6, 3)]
TOKENS = ("x", "dt", "B", "C")


def recurrence(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx=None):
    """The recurrence as it is defined, one token and one channel at a time; returns y (B, L, d) and the last state."""
    y, last = torch.zeros_like(x), torch.zeros_like(initial_state)
    for b in range(len(x)):
        for i in range(x.shape[2]):
            state, values = initial_state[b, i], []
            for t in range(x.shape[1]):
                if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                    state = torch.zeros_like(state)
                step = F.softplus(dt[b, t, i] + dt_bias[i])
                write, read = (m[b, t, i // (x.shape[2] // m.shape[2])] for m in (B, C))
                state = (step * A[i]).exp() * state + step * x[b, t, i] * write
                values.append(state @ read + D[i] * x[b, t, i])
            y = y.index_put((torch.tensor(b), torch.arange(x.shape[1]), torch.tensor(i)), torch.stack(values))
            last = last.index_put((torch.tensor(b), torch.tensor(i)), state)
    return y, last


def make(length, grouping=(12, 2, 4), batch=2, N=5, dtype=torch.float64, seed=0):
    """Random arguments of selective_scan as a dict of leaves that require grad."""
    channels, gb, gc = grouping
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = dict(
        x=normal(batch, length, channels),
        dt=normal(batch, length, channels),
        A=-normal(channels, N).exp(),
        B=normal(batch, length, gb, N),
        C=normal(batch, length, gc, N),
        D=normal(channels),
        dt_bias=normal(channels) - 2,
        initial_state=normal(batch, channels, N),
    )
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


def with_gradients(y, state, args):
    """Outputs, and the gradients of a fixed random combination of them."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, state)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, state), weights, strict=True))
    return [y, state, *torch.autograd.grad(loss, list(args.values()))]


def documents(batch, length, seed):
    """Some documents in each row; a later one may have the number of an earlier one."""
    ends = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return ends.long().cumsum(1) % 2


@settings(max_examples=6, deadline=None)
@given(length=st.integers(1, 11), grouping=st.sampled_from(GROUPINGS), packed=st.booleans(), seed=st.integers(0, 10))
def test_it_is_the_recurrence_with_its_gradients(length, grouping, packed, seed):
    args = make(length, grouping, batch=1, N=3, seed=seed)
    seq_idx = documents(1, length, seed) if packed else None
    found = selective_scan(**args, seq_idx=seq_idx, return_final_state=True)
    wanted = recurrence(**args, seq_idx=seq_idx)
    for a, b in zip(with_gradients(*found, args), with_gradients(*wanted, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_with_one_decay_and_step_for_a_head_it_is_mamba_2():
    """In several pieces, with documents that cross them."""
    args, heads, length = make(2 * PIECE + 5, N=5), 4, 2 * PIECE + 5
    seq_idx = documents(2, length, 3)
    with torch.no_grad():
        for name in ("dt", "dt_bias"):
            args[name].copy_(
                args[name].unflatten(-1, (heads, -1))[..., :1].expand(*args[name].shape[:-1], heads, 3).flatten(-2)
            )
        args["A"].copy_(args["A"][:1, :1].expand(12, 5))
    found = selective_scan(**args, seq_idx=seq_idx, return_final_state=True)
    by_head = {name: args[name].unflatten(-1, (heads, -1)) for name in ("x", "dt", "dt_bias")}
    y, state = ssd_scan(
        by_head["x"], by_head["dt"][..., 0], args["A"][::3, 0], args["B"], args["C"],
        dt_bias=by_head["dt_bias"][..., 0], initial_state=args["initial_state"].unflatten(1, (heads, -1)),
        seq_idx=seq_idx, return_final_state=True,
    )  # fmt: skip
    y = y.flatten(2) + args["D"] * args["x"]
    found, wanted = with_gradients(*found, args), with_gradients(y, state.flatten(1, 2), args)
    for name, a, b in zip(("y", "state", *args), found, wanted, strict=True):
        if name in ("dt", "dt_bias"):
            a, b = (g.unflatten(-1, (heads, -1)).sum(-1) for g in (a, b))
        elif name == "A":
            a, b = a.sum(), b.sum()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_it_goes_on_from_a_state_and_steps():
    args = make(20)
    tokens = {name: args.pop(name) for name in TOKENS}
    whole, last = selective_scan(**tokens, **args, return_final_state=True)
    halves = [{name: t[:, part] for name, t in tokens.items()} for part in (slice(13), slice(13, None))]
    first, state = selective_scan(**halves[0], **args, return_final_state=True)
    second, end = selective_scan(**halves[1], **args | {"initial_state": state}, return_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)
    state = args.pop("initial_state").detach().clone()
    ys = [selective_step(state, **{name: tensor[:, t] for name, tensor in tokens.items()}, **args) for t in range(20)]
    torch.testing.assert_close(torch.stack(ys, 1), whole.detach())
    torch.testing.assert_close(state, last.detach())


def test_steps_without_softplus_bias_and_skip():
    args = {name: t.detach() for name, t in make(9).items() if name not in ("D", "dt_bias", "initial_state")}
    wanted = selective_scan(**args)
    args["dt"] = F.softplus(args["dt"])
    torch.testing.assert_close(selective_scan(**args, dt_softplus=False), wanted)
    states = [torch.zeros(2, 12, 5, dtype=torch.float64) for _ in range(2)]
    token = {name: t[:, 0] if name in TOKENS else t for name, t in args.items()}
    torch.testing.assert_close(selective_step(states[0], **token, dt_softplus=False), wanted[:, 0])


def test_it_is_in_float32_whatever_it_is_given():
    args = {name: t.detach().bfloat16() for name, t in make(50).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = selective_scan(**args, return_final_state=True)
    wanted, last = selective_scan(**{name: t.double() for name, t in args.items()}, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"x": (2, 9)}, r"x: expected shape \(B, L, d\), got \(2, 9\)"),
        ({"dt": (2, 9, 1)}, r"dt: expected shape \(B, L, d\) = \(2, 9, 12\), got"),
        ({"A": (12,)}, r"A: expected shape \(d, N\) with d = 12, got \(12,\)"),
        ({"B": (2, 9, 5, 5)}, "B: expected a number of groups that divides d = 12, got 5"),
        ({"C": (2, 9, 4, 6)}, r"C: expected shape \(B, L, groups, N\) with \(B, L\) = \(2, 9\) and N = 5, got"),
        ({"D": (1,)}, r"D: expected shape \(d\) = \(12,\), got"),
        ({"dt_bias": (5,)}, r"dt_bias: expected shape \(d\) = \(12,\), got"),
        ({"initial_state": (2, 12, 3)}, r"initial_state: expected shape \(B, d, N\) = \(2, 12, 5\), got"),
        ({"seq_idx": (2, 8)}, r"seq_idx: expected shape \(B, L\) = \(2, 9\), got"),
    ],
)
def test_what_does_not_fit_is_told(change, told):
    args = {name: t.detach() for name, t in make(9).items()}
    args |= {name: torch.zeros(shape, dtype=torch.long) for name, shape in change.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        selective_scan(**args)


def test_no_tokens_and_documents_that_are_no_integers_are_told():
    args = {name: t.detach() for name, t in make(3).items()}
    with pytest.raises(ValueError, match="^x: expected at least one token, got L = 0"):
        selective_scan(**{name: t[:, :0] if name in TOKENS else t for name, t in args.items()})
    with pytest.raises(ValueError, match="^seq_idx: expected integers, got torch.float32"):
        selective_scan(**args, seq_idx=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"^state: expected shape \(B, d, N\) = \(2, 12, 5\), got"):
        token = {name: t[:, 0] for name, t in args.items() if name in TOKENS}
        selective_step(torch.zeros(2, 12, 4), **token, A=args["A"])
