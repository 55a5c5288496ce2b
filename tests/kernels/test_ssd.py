"""ssd_scan, ssd_step and ssd_matrix against a token-by-token recurrence in float64."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transpoint.kernels.ssd import ssd_matrix, ssd_scan, ssd_step

# (H, Hx, Hb, Hc): what a converted teacher has, what Mamba-2 has, and every way one may have more heads than another.
GROUPINGS = [
    (9, 3, 3, 9),
    (4, 4, 1, 1),
    (6, 6, 6, 6),
    (4, 1, 1, 4),
    (4, 1, 4, 2),
    (4, 4, 2, 1),
    (6, 2, 3, 6),
    (6, 3, 3, 2),
]


def recurrence(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, seq_idx=None, dt_softplus=True, pair=None):
    """The recurrence as it is defined, one token and one head at a time; returns y (B, L, H, P) and the last state."""
    batch, length, heads = dt.shape
    pair = pair or (lambda h, groups: h // (heads // groups))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.log1p(torch.exp(dt)) if dt_softplus else dt
    ys, states = [], []
    for b in range(batch):
        for h in range(heads):
            x_, B_, C_ = (t[b, :, pair(h, t.shape[2])] for t in (x, B, C))
            state = x.new_zeros(x.shape[-1], B.shape[-1]) if initial_state is None else initial_state[b, h]
            for t in range(length):
                if seq_idx is not None and t > 0 and seq_idx[b, t] != seq_idx[b, t - 1]:
                    state = torch.zeros_like(state)
                state = torch.exp(dt[b, t, h] * A[h]) * state + dt[b, t, h] * torch.outer(x_[t], B_[t])
                y = state @ C_[t]
                ys.append(y if D is None else y + D[h] * x_[t])
            states.append(state)
    y = torch.stack(ys).view(batch, heads, length, -1).transpose(1, 2)
    return y, torch.stack(states).view(batch, heads, *states[0].shape)


def make(length, grouping=(4, 2, 2, 4), batch=2, P=3, N=5, dtype=torch.float64, seed=0):
    """Random arguments of ssd_scan as a dict of leaves that require grad."""
    heads, hx, hb, hc = grouping
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return dict(
        x=normal(batch, length, hx, P),
        dt=normal(batch, length, heads),
        A=(-0.05 - 2 * torch.rand(heads, generator=g, dtype=torch.float64)).to(dtype).requires_grad_(),
        B=normal(batch, length, hb, N),
        C=normal(batch, length, hc, N),
        D=normal(heads),
        dt_bias=normal(heads),
        initial_state=normal(batch, heads, P, N),
    )


def double(args):
    return {k: v.detach().double().requires_grad_() for k, v in args.items()}


def run_with_gradients(function, args, **options):
    """Outputs and the gradients of a fixed random combination of y and the final state."""
    y, state = function(**args, **options)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (y, state)]
    loss = sum((t.double() * w).sum() for t, w in zip((y, state), weights, strict=True))
    grads = torch.autograd.grad(loss, list(args.values()))
    return {"y": y, "state": state, **{f"d{name}": grad for name, grad in zip(args, grads, strict=True)}}


def assert_same(got, want, rtol=1e-8, atol=1e-8):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].isfinite().all(), name
        torch.testing.assert_close(
            got[name].double(), want[name].double(), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_values_and_gradients_for_every_head_grouping(grouping):
    args = make(11, grouping)
    got = run_with_gradients(ssd_scan, args, chunk_size=4, return_final_state=True)
    assert_same(got, run_with_gradients(recurrence, args))


@pytest.mark.parametrize("length", [1, 5, 63, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_for_odd_lengths(length, dtype):
    args = make(length, (3, 1, 1, 3), batch=1, dtype=dtype)
    got = run_with_gradients(ssd_scan, args, return_final_state=True)
    tolerance = 1e-8 if dtype == torch.float64 else 2e-4
    assert_same(got, run_with_gradients(recurrence, double(args)), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_shape_chunk_and_documents(data):
    length = data.draw(st.integers(1, 20))
    args = make(length, data.draw(st.sampled_from(GROUPINGS)), P=2, N=data.draw(st.integers(1, 3)))
    documents = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    seq_idx = torch.tensor([sorted(data.draw(documents)) for _ in range(2)])
    for name in ("D", "dt_bias", "initial_state"):
        if data.draw(st.booleans()):
            del args[name]
    chunk_size = data.draw(st.integers(1, 24))
    got = run_with_gradients(ssd_scan, args, seq_idx=seq_idx, chunk_size=chunk_size, return_final_state=True)
    assert_same(got, run_with_gradients(recurrence, args, seq_idx=seq_idx))


def test_heads_are_paired_consecutively_not_by_modulo():
    args = make(7, (9, 3, 3, 9))
    y = ssd_scan(**args)
    torch.testing.assert_close(y, recurrence(**args)[0])
    by_modulo, _ = recurrence(**args, pair=lambda h, groups: h % groups)
    wrong = [h for h in range(9) if not torch.allclose(y[:, :, h], by_modulo[:, :, h])]
    assert wrong == [h for h in range(9) if h // 3 != h % 3]


def test_defaults_leave_out_bias_skip_state_and_keep_softplus():
    args = make(6)
    main = {k: args[k] for k in ("x", "dt", "A", "B", "C")}
    torch.testing.assert_close(ssd_scan(**main), recurrence(**main)[0])
    main["dt"] = torch.rand_like(main["dt"])
    torch.testing.assert_close(ssd_scan(**main, dt_softplus=False), recurrence(**main, dt_softplus=False)[0])


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_packed_documents_equal_separate_documents(chunk_size):
    lengths = [4, 1, 7, 3]
    args = make(sum(lengths), batch=1)
    # A value that comes back later is another document.
    seq_idx = torch.cat([torch.full((1, n), i) for n, i in zip(lengths, [5, 6, 9, 5], strict=True)], 1)
    y, state = ssd_scan(**args, seq_idx=seq_idx, chunk_size=chunk_size, return_final_state=True)
    start = 0
    for i, n in enumerate(lengths):
        part = {k: v[:, start : start + n] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
        if i > 0:
            del part["initial_state"]
        y_part, state_part = ssd_scan(**part, return_final_state=True)
        torch.testing.assert_close(y[:, start : start + n], y_part)
        start += n
    torch.testing.assert_close(state, state_part)


@pytest.mark.parametrize("tiny_steps", [False, True])
def test_strong_decay_is_finite_and_accurate(tiny_steps):
    args = make(130, (4, 2, 2, 4), batch=1, dtype=torch.float32)
    with torch.no_grad():
        args["A"].fill_(-16)
        args["dt"].fill_(4)
        if tiny_steps:  # steps that keep the state, between steps that erase it
            args["dt"][:, 1::2] = 0.001
    del args["dt_bias"]
    got = run_with_gradients(ssd_scan, args, dt_softplus=False, return_final_state=True)
    want = run_with_gradients(recurrence, double(args), dt_softplus=False)
    assert_same(got, want, rtol=2e-3, atol=2e-3)


def test_long_memory_keeps_float32_accuracy():
    args = make(300, (2, 1, 1, 2), batch=1, dtype=torch.float32)
    with torch.no_grad():
        args["A"].fill_(-1e-3)
    got = run_with_gradients(ssd_scan, args, return_final_state=True)
    want = run_with_gradients(recurrence, double(args))
    for name in want:
        assert (got[name] - want[name]).abs().max() < 1e-5 * want[name].abs().max(), name


def test_splitting_a_sequence_equals_one_pass():
    args = make(40)
    y, state = ssd_scan(**args, chunk_size=8, return_final_state=True)
    first = {k: v[:, :17] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
    second = {k: v[:, 17:] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
    y_first, passed = ssd_scan(**first, chunk_size=8, return_final_state=True)
    y_second, last = ssd_scan(**{**second, "initial_state": passed}, chunk_size=8, return_final_state=True)
    torch.testing.assert_close(torch.cat([y_first, y_second], 1), y)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_steps_equal_the_scan(grouping, dt_softplus):
    args = {k: v.detach() for k, v in make(9, grouping, dtype=torch.float32).items()}
    if not dt_softplus:
        args["dt"], args["dt_bias"] = args["dt"].abs(), args["dt_bias"].abs()
    y, last = ssd_scan(**args, dt_softplus=dt_softplus, return_final_state=True)
    state = args.pop("initial_state").clone()
    for t in range(9):
        token = {k: v[:, t] if k in ("x", "dt", "B", "C") else v for k, v in args.items()}
        torch.testing.assert_close(ssd_step(state, **token, dt_softplus=dt_softplus), y[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_step_updates_a_bfloat16_state_in_place():
    args = {k: v.detach()[:, 0] if k in ("x", "dt", "B", "C") else v.detach() for k, v in make(1).items()}
    args = {k: v.float() for k, v in args.items()}
    state = args.pop("initial_state").bfloat16()
    exact = state.float()
    y = ssd_step(state, **args)
    assert torch.equal(y, ssd_step(exact, **args))  # y comes from the state before it is rounded
    assert torch.equal(state, exact.bfloat16())


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_matrix_times_x_equals_the_scan(grouping):
    args = make(10, grouping)
    M = ssd_matrix(args["dt"], args["A"], args["B"], args["C"], dt_bias=args["dt_bias"])
    heads, hx, *_ = grouping
    assert M.shape == (2, heads, 10, 10)
    assert (M.triu(1) == 0).all()
    x = args["x"].repeat_interleave(heads // hx, 2)
    y = torch.einsum("bhts,bshp->bthp", M, x)
    del args["D"], args["initial_state"]
    got = torch.autograd.grad(y.square().sum(), list(args.values()))
    want_y, _ = recurrence(**args)
    torch.testing.assert_close(y, want_y)
    want = torch.autograd.grad(want_y.square().sum(), list(args.values()))
    for name, g, w in zip(args, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_matrix_takes_raw_step_sizes():
    args = make(6, (2, 1, 1, 2))
    dt = args["dt"].detach().abs()
    M = ssd_matrix(dt, args["A"], args["B"], args["C"], dt_softplus=False)
    C, B = args["C"][:, :, 1], args["B"][:, :, 0]
    want = (C[1, 4] @ B[1, 2]) * dt[1, 2, 1] * torch.exp((dt[1, 3, 1] + dt[1, 4, 1]) * args["A"][1])
    torch.testing.assert_close(M[1, 1, 4, 2], want)


def test_dtypes_and_autocast():
    args = make(20, dtype=torch.float32)
    y, state = ssd_scan(**args, return_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y_autocast = ssd_scan(**args)
    assert torch.equal(y, y_autocast)  # the scan stays in float32
    half = {k: v.bfloat16() if k in ("x", "B", "C") else v for k, v in args.items()}
    y_half, state_half = ssd_scan(**half, return_final_state=True)
    assert y_half.dtype == torch.bfloat16 and state_half.dtype == torch.float32
    exact, _ = ssd_scan(**{k: v.float() for k, v in half.items()}, return_final_state=True)
    assert torch.equal(y_half, exact.bfloat16())
    assert y.dtype == state.dtype == torch.float32


def test_views_of_one_wide_projection():
    args = make(20)
    wide = torch.cat([args["x"].flatten(2), args["B"].flatten(2), args["C"].flatten(2), args["dt"]], -1)
    x, B, C, dt = wide.split([2 * 3, 2 * 5, 4 * 5, 4], -1)
    views = dict(x=x.unflatten(2, (2, 3)), B=B.unflatten(2, (2, 5)), C=C.unflatten(2, (4, 5)), dt=dt)
    assert not views["x"].is_contiguous()
    assert torch.equal(ssd_scan(**{**args, **views}), ssd_scan(**args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 6, 3, 3)), r"^x: expected a number of heads that divides H = 4, got 3$"),
        (dict(B=torch.zeros(2, 6, 8, 5)), r"^B: expected a number of heads that divides H = 4, got 8$"),
        (dict(C=torch.zeros(2, 7, 4, 5)), r"^C: expected shape \(B, L, heads, N\) with \(B, L\) = \(2, 6\), got"),
        (dict(C=torch.zeros(2, 6, 4, 4)), r"^C: expected the state size of B, N = 5, got 4$"),
        (dict(dt=torch.zeros(2, 6)), r"^dt: expected shape \(B, L, H\), got \(2, 6\)$"),
        (dict(A=torch.zeros(3)), r"^A: expected shape \(H\) = \(4,\), got \(3,\)$"),
        (dict(D=torch.zeros(4, 3)), r"^D: expected shape \(H\) = \(4,\)"),
        (dict(dt_bias=torch.zeros(1)), r"^dt_bias: expected shape \(H\) = \(4,\)"),
        (
            dict(initial_state=torch.zeros(2, 4, 5, 3)),
            r"^initial_state: expected shape \(B, H, P, N\) = \(2, 4, 3, 5\)",
        ),
        (dict(seq_idx=torch.zeros(6, dtype=torch.int32)), r"^seq_idx: expected shape \(B, L\) = \(2, 6\)"),
        (dict(seq_idx=torch.zeros(2, 6)), r"^seq_idx: expected integers, got torch.float32$"),
        (dict(chunk_size=0), r"^chunk_size: expected a positive integer, got 0$"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**make(6), **change})


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="^x: expected at least one token, got L = 0$"):
        ssd_scan(**make(0))
    with pytest.raises(ValueError, match="^x: expected at least one token, got B = 0$"):
        ssd_scan(**make(6, batch=0))


def test_step_errors_name_the_argument():
    args = {k: v.detach()[:, 0] if k in ("x", "dt", "B", "C") else v.detach() for k, v in make(1).items()}
    state = args.pop("initial_state")
    with pytest.raises(ValueError, match=r"^state: expected shape \(B, H, P, N\) = \(2, 4, 3, 5\)"):
        ssd_step(state.mT, **args)
    with pytest.raises(ValueError, match=r"^x: expected shape \(B, heads, P\)"):
        ssd_step(state, **{**args, "x": args["x"].unsqueeze(1)})
