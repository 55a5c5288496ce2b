"""delta_scan and delta_step against a token-by-token recurrence in float64, and against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from transpoint.kernels.delta_reference import delta_scan, delta_step

# (H, Hq, Hk, Hv): what a converted teacher has, what Qwen3-Next has, and other ways to share heads.
GROUPINGS = [(9, 9, 3, 3), (4, 2, 2, 4), (6, 6, 6, 6), (4, 4, 1, 2)]


def recurrence(q, k, v, g, beta, initial_state=None, seq_idx=None):
    """The recurrence as it is defined, one token and one head at a time; returns y (B, L, H, P) and the last state."""
    batch, length, heads = g.shape
    ys, states = [], []
    for b in range(batch):
        for h in range(heads):
            q_, k_, v_ = (t[b, :, h // (heads // t.shape[2])] for t in (q, k, v))
            state = q.new_zeros(v.shape[-1], k.shape[-1]) if initial_state is None else initial_state[b, h]
            for t in range(length):
                if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                    state = torch.zeros_like(state)
                erased = torch.eye(k.shape[-1], dtype=q.dtype) - beta[b, t, h] * torch.outer(k_[t], k_[t])
                state = g[b, t, h].exp() * state @ erased + beta[b, t, h] * torch.outer(v_[t], k_[t])
                ys.append(state @ q_[t])
            states.append(state)
    y = torch.stack(ys).view(batch, heads, length, -1).transpose(1, 2)
    return y, torch.stack(states).view(batch, heads, *states[0].shape)


def make(length, grouping=(4, 2, 2, 4), batch=2, P=3, N=5, dtype=torch.float64, seed=0):
    """Random arguments of delta_scan as a dict of leaves that require grad."""
    heads, hq, hk, hv = grouping
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = dict(
        q=normal(batch, length, hq, N),
        k=F.normalize(normal(batch, length, hk, N), dim=-1),
        v=normal(batch, length, hv, P),
        g=-0.2 * normal(batch, length, heads).exp(),
        beta=normal(batch, length, heads).sigmoid(),
        initial_state=normal(batch, heads, P, N),
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


@settings(max_examples=15, deadline=None)
@given(
    length=st.integers(1, 70),
    grouping=st.sampled_from(GROUPINGS),
    chunk_size=st.sampled_from([None, 1, 7, 16, 64]),
    packed=st.booleans(),
    seed=st.integers(0, 10),
)
def test_it_is_the_recurrence_with_its_gradients(length, grouping, chunk_size, packed, seed):
    args = make(length, grouping, batch=1, seed=seed)
    seq_idx = documents(1, length, seed) if packed else None
    found = delta_scan(**args, seq_idx=seq_idx, return_final_state=True, chunk_size=chunk_size)
    wanted = recurrence(**args, seq_idx=seq_idx)
    for a, b in zip(with_gradients(*found, args), with_gradients(*wanted, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_it_is_what_transformers_computes():
    args = make(150, (4, 2, 2, 4), P=8, N=16, dtype=torch.float32)
    wanted, state = torch_chunk_gated_delta_rule(
        args["q"], args["k"], args["v"], args["g"], args["beta"],
        initial_state=args["initial_state"].mT, output_final_state=True,
    )  # fmt: skip
    found, own = delta_scan(**args, return_final_state=True)
    torch.testing.assert_close(found * 16**-0.5, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own, state.mT, rtol=1e-4, atol=1e-4)


def test_it_goes_on_from_a_state_and_steps():
    args = make(40)
    whole, last = delta_scan(**args, return_final_state=True)
    halves = [
        {name: t[:, part] for name, t in args.items() if name != "initial_state"}
        for part in (slice(23), slice(23, None))
    ]
    first, state = delta_scan(**halves[0], initial_state=args["initial_state"], return_final_state=True)
    second, end = delta_scan(**halves[1], initial_state=state, return_final_state=True)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)
    state, steps = args["initial_state"].detach().clone(), {name: t.detach() for name, t in args.items()}
    del steps["initial_state"]
    ys = [delta_step(state, **{name: tensor[:, t] for name, tensor in steps.items()}) for t in range(40)]
    torch.testing.assert_close(torch.stack(ys, 1), whole.detach())
    torch.testing.assert_close(state, last.detach())


def test_a_key_is_written_over():
    """With beta = 1 and no decay a key of length 1 gives back the last value under it, whatever was there."""
    k = F.normalize(torch.randn(1, 6, 1, 4), dim=-1)
    k[:, 5] = k[:, 1]
    v, ones = torch.randn(1, 6, 1, 3), torch.ones(1, 6, 1)
    y = delta_scan(k, k, v, 0 * ones, ones)
    torch.testing.assert_close(y, v)


def test_it_is_in_float32_whatever_it_is_given():
    args = {name: t.detach().bfloat16() for name, t in make(50).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = delta_scan(**args, return_final_state=True)
    wanted, last = delta_scan(**{name: t.double() for name, t in args.items()}, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"k": (2, 9, 3, 5)}, "k: expected a number of heads that divides H = 4, got 3"),
        ({"q": (2, 9, 2, 6)}, "q: expected the size of keys, N = 5, got 6"),
        ({"v": (2, 8, 4, 3)}, r"v: expected shape \(B, L, heads, P\) with \(B, L\) = \(2, 9\), got"),
        ({"g": (2, 9)}, r"g: expected shape \(B, L, H\), got \(2, 9\)"),
        ({"beta": (2, 9, 1)}, r"beta: expected shape \(B, L, H\) = \(2, 9, 4\), got"),
        ({"initial_state": (2, 4, 5, 3)}, r"initial_state: expected shape \(B, H, P, N\) = \(2, 4, 3, 5\), got"),
        ({"seq_idx": (2, 8)}, r"seq_idx: expected shape \(B, L\) = \(2, 9\), got"),
        ({"chunk_size": 0}, "chunk_size: expected a positive integer, got 0"),
    ],
)
def test_what_does_not_fit_is_named(change, told):
    args: dict = {name: t.detach() for name, t in make(9).items()}
    args |= {name: torch.zeros(shape) if isinstance(shape, tuple) else shape for name, shape in change.items()}
    with pytest.raises(ValueError, match=told):
        delta_scan(**args)


def test_documents_are_numbers_and_there_is_text():
    args = {name: t.detach() for name, t in make(9).items()}
    with pytest.raises(ValueError, match="seq_idx: expected integers, got torch.float32"):
        delta_scan(**args, seq_idx=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="expected at least one token, got L = 0"):
        delta_scan(**{name: t if name == "initial_state" else t[:, :0] for name, t in args.items()})
