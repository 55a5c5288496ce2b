"""causal_conv1d and causal_conv1d_step against a loop over tokens and taps."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels.conv import causal_conv1d, causal_conv1d_step


def naive(x, weight, bias=None, initial_state=None, seq_idx=None, activation=None):
    """The convolution as it is defined, one token and one tap at a time; returns y and the last W - 1 inputs."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    zero = torch.zeros_like(x[0, 0])
    ys, tails = [], []
    for b in range(batch):
        history = [zero] * (width - 1) if initial_state is None else list(initial_state[b].mT)
        for t in range(length):
            if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                history = [zero] * (width - 1)
            window = [*history, x[b, t]]
            y = sum(weight[:, k] * window[k] for k in range(width))
            y = y if bias is None else y + bias
            ys.append(y * torch.sigmoid(y) if activation == "silu" else y)
            history = window[1:]
        tails.append(torch.stack(history, -1) if history else x.new_zeros(channels, 0))
    return torch.stack(ys).view(x.shape), torch.stack(tails)


def make(length, channels=3, width=4, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = dict(
        x=(batch, length, channels),
        weight=(channels, width),
        bias=(channels,),
        initial_state=(batch, channels, width - 1),
    )
    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for k, s in shapes.items()}


def gradients(outputs, args):
    loss = sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)
    return torch.autograd.grad(loss, list(args.values()), materialize_grads=True)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_values_gradients_and_final_state(data):
    length = data.draw(st.integers(1, 9))
    args = make(length, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)))
    for name in ("bias", "initial_state"):
        if data.draw(st.booleans()):
            del args[name]
    seq_idx = None
    if data.draw(st.booleans()):
        documents = st.lists(st.integers(0, 2), min_size=length, max_size=length)
        seq_idx = torch.tensor([data.draw(documents) for _ in range(2)])
    options = dict(seq_idx=seq_idx, activation=data.draw(st.sampled_from([None, "silu"])))
    got = causal_conv1d(**args, **options, return_final_state=True)
    want = naive(**args, **options)
    for name, g, w in zip(("y", "state"), got, want, strict=True):
        torch.testing.assert_close(g, w, msg=lambda m, n=name: f"{n}: {m}")
    for name, g, w in zip(args, gradients(got, args), gradients(want, args), strict=True):
        torch.testing.assert_close(g, w, msg=lambda m, n=name: f"d{n}: {m}")


def test_last_tap_is_the_current_token():
    x = torch.randn(1, 5, 2)
    identity = torch.zeros(2, 4)
    identity[:, -1] = 1
    assert torch.equal(causal_conv1d(x, identity), x)
    previous = identity.roll(-1, 1)
    assert torch.equal(causal_conv1d(x, previous)[:, 1:], x[:, :-1])


def test_packed_documents_equal_separate_documents():
    lengths = [2, 1, 5]
    args = make(sum(lengths), batch=1)
    seq_idx = torch.tensor([[0, 0, 1, 4, 4, 4, 4, 4]])
    y, state = causal_conv1d(**args, seq_idx=seq_idx, activation="silu", return_final_state=True)
    start = 0
    for i, n in enumerate(lengths):
        part = {**args, "x": args["x"][:, start : start + n]}
        if i > 0:
            del part["initial_state"]
        y_part, state_part = causal_conv1d(**part, activation="silu", return_final_state=True)
        torch.testing.assert_close(y[:, start : start + n], y_part)
        start += n
    torch.testing.assert_close(state, state_part)


@pytest.mark.parametrize("split", [1, 2, 6])
def test_splitting_a_sequence_equals_one_pass(split):
    args = make(7)
    y, state = causal_conv1d(**args, return_final_state=True)
    y_first, passed = causal_conv1d(**{**args, "x": args["x"][:, :split]}, return_final_state=True)
    rest = {**args, "x": args["x"][:, split:], "initial_state": passed}
    y_second, last = causal_conv1d(**rest, return_final_state=True)
    torch.testing.assert_close(torch.cat([y_first, y_second], 1), y)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_the_whole_sequence(width, activation):
    args = {k: v.detach() for k, v in make(6, width=width, dtype=torch.float32).items()}
    y, last = causal_conv1d(**args, activation=activation, return_final_state=True)
    state = args["initial_state"].clone()
    for t in range(6):
        y_t = causal_conv1d_step(args["x"][:, t], state, args["weight"], args["bias"], activation=activation)
        torch.testing.assert_close(y_t, y[:, t])
    assert torch.equal(state, last)


def test_bfloat16_is_rounded_once():
    args = {k: v.detach() for k, v in make(6, dtype=torch.bfloat16).items()}
    y, state = causal_conv1d(**args, activation="silu", return_final_state=True)
    exact = causal_conv1d(**{k: v.float() for k, v in args.items()}, activation="silu")
    assert y.dtype == state.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 3)), r"^x: expected shape \(B, L, C\) with L >= 1, got \(2, 3\)$"),
        (dict(x=torch.zeros(2, 0, 3)), r"^x: expected shape \(B, L, C\) with L >= 1, got \(2, 0, 3\)$"),
        (dict(weight=torch.zeros(3, 1, 4)), r"^weight: expected shape \(C, W\) with C = 3, W >= 1, got \(3, 1, 4\)$"),
        (dict(bias=torch.zeros(4)), r"^bias: expected shape \(C\) = \(3,\), got \(4,\)$"),
        (dict(initial_state=torch.zeros(2, 3, 4)), r"^initial_state: expected shape \(B, C, W-1\) = \(2, 3, 3\), got"),
        (dict(seq_idx=torch.zeros(2, 5, dtype=torch.long)), r"^seq_idx: expected shape \(B, L\) = \(2, 6\), got"),
        (dict(seq_idx=torch.zeros(2, 6)), r"^seq_idx: expected integers, got torch.float32$"),
        (dict(activation="gelu"), r"^activation: expected None or \"silu\", got 'gelu'$"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make(6), **change})


def test_step_errors_name_the_argument():
    x, state, weight = torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"^conv_state: expected shape \(B, C, W-1\) = \(2, 3, 3\), got \(2, 3, 4\)$"):
        causal_conv1d_step(x, torch.zeros(2, 3, 4), weight)
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, C\), got \(2, 1, 3\)$"):
        causal_conv1d_step(x.unsqueeze(1), state, weight)
