"""Triton kernels of Mamba-1's selective scan, forward and backward, registered as torch custom ops.

Each number of a state has a recurrence of its own, h_t = a_t h_{t-1} + b_t, with a_t = exp(dt_t A) and
b_t = dt_t x_t B_t (Gu and Dao 2023, arXiv 2312.00752, section 3.3.2): no matrix unit can be used. There are as many of
them as a GPU has threads, so programs, of one warp each, walk token by token with the states of a few channels in
registers: a scan over tokens in parallel would cost more than it saves.

With G_t the gradient of h_t, and a_{L+1} = 1 (differentiated by hand):

    G_t = dy_t C_t + a_{t+1} G_{t+1}                    e_t = a_t h_{t-1}  (what token t has kept)
    dC_t = sum_i dy_t h_t        dB_t = sum_i G_t dt_t x_t        dx_t = dt_t G_t B_t + D dy_t
    d(dt)_t = x_t G_t B_t + sum_n G_t e_t A             dA = sum_t G_t e_t dt_t

    _scan_kernel       y, the states that enter the chunks, and the last one
    _gradient_kernel   the walk back, by chunks, whose states are computed anew from the one that enters: all gradients

dB and dC are sums over the channels of a group. Where a group has several programs, their sums are added up
afterwards, in an order that does not vary.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import inner_contiguous, power_of_2
from .custom_op import CustomOp, once
from .launch import launched
from .ssd_triton import LOG2E, softplus

# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters

CHUNK = 8  # tokens whose states the walk back holds in registers: of the states, one in so many is saved
NUMBERS = 512  # of the states, for each warp: 16 a thread
WARPS = 1


def config(N: int, backward: bool) -> dict:
    """Channels of a program, so that registers hold their states, and warps.

    Chosen for few instructions and register spills on sm_90, as ptxas tells them; not timed.
    """
    return {"BLOCK_D": max(1, NUMBERS * WARPS // power_of_2(N)), "num_warps": WARPS, "num_stages": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _states(BLOCK_N: tl.constexpr):
    """The numbers of a state. That no more than 4 are known to be contiguous gives a thread 4 of each of its channels,
    which shares the shuffles between sums over channels and sums over the state."""
    return tl.max_contiguous(tl.arange(0, BLOCK_N), min(BLOCK_N, 4))


@triton.jit
def _inside(column, end, t, L):
    """Which columns of row t there are: those before `end`, and none past the last row."""
    return column < tl.where(t < L, end, 0)


@triton.jit
def _tokens(ptr, stride, start, L, column, end, Q: tl.constexpr):
    """Q rows from `start` on, as they are, all loaded before any is used; zeros past the end."""
    rows = ()
    for q in tl.static_range(Q):
        t = start + q
        rows += (tl.load(ptr + t * stride + column, mask=_inside(column, end, t, L), other=0.0),)
    return rows


@triton.jit
def _step(raw, bias, ok, SOFTPLUS: tl.constexpr):
    """The step: 0 past the end, which neither decays nor writes."""
    raw = raw.to(tl.float32) + bias
    return tl.where(ok, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _decay(step, rates, seq_idx, stride, t, L, HAS_SEQ: tl.constexpr):
    """Decays (channels, N) from steps (channels) and rates in base 2; 0 at the first token of a document."""
    log = step[:, None] * rates
    if HAS_SEQ:
        inside = (t > 0) & (t < L)
        here = tl.load(seq_idx + t * stride, mask=inside, other=0)
        before = tl.load(seq_idx + (t - 1) * stride, mask=inside, other=0)
        log += tl.where(here != before, -float("inf"), 0.0)
    return tl.exp2(log)


@triton.jit
def _scan_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, initial, out, states, final,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, L, d, chunks, blocks,
    GROUP: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    SAVES: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    per_group = (GROUP + BLOCK_D - 1) // BLOCK_D  # channels of a program are of one group of B, and of C
    first = block // per_group * GROUP
    i = first + block % per_group * BLOCK_D + tl.arange(0, BLOCK_D)
    n = _states(BLOCK_N)
    end = first + GROUP
    i_ok, n_ok = i < end, n < N
    ok = i_ok[:, None] & n_ok[None, :]
    place = i[:, None] * N + n[None, :]
    x += b * x_sb
    dt += b * dt_sb
    B += b * B_sb + first // SB * B_sg
    C += b * C_sb + first // SC * C_sg
    out += b * L * d
    if HAS_SEQ:
        seq_idx += b * seq_sb
    rates = tl.load(A + place, mask=ok, other=0.0).to(tl.float32) * LOG2E
    bias, skip = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + i, mask=i_ok, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + i, mask=i_ok, other=0.0).to(tl.float32)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + b * d * N + place, mask=ok, other=0.0).to(tl.float32)
    start = tl.cast(0, tl.int64)
    xs, dts = _tokens(x, x_sl, start, L, i, end, Q), _tokens(dt, dt_sl, start, L, i, end, Q)
    Bs, Cs = _tokens(B, B_sl, start, L, n, N, Q), _tokens(C, C_sl, start, L, n, N, Q)
    for k in range(0, chunks):
        start = tl.cast(k, tl.int64) * Q
        if SAVES:
            saved = state.to(states.dtype.element_ty)
            tl.store(states + (b * chunks + k) * d * N + place, saved, mask=ok)
        # The next chunk's inputs travel while this one is computed.
        after = start + Q
        next_xs, next_dts = _tokens(x, x_sl, after, L, i, end, Q), _tokens(dt, dt_sl, after, L, i, end, Q)
        next_Bs, next_Cs = _tokens(B, B_sl, after, L, n, N, Q), _tokens(C, C_sl, after, L, n, N, Q)
        for q in tl.static_range(Q):
            t = start + q
            x_ = xs[q].to(tl.float32)
            step = _step(dts[q], bias, _inside(i, end, t, L), SOFTPLUS)
            added = (step * x_)[:, None] * Bs[q].to(tl.float32)[None, :]
            state = _decay(step, rates, seq_idx, seq_sl, t, L, HAS_SEQ) * state + added
            y = tl.sum(state * Cs[q].to(tl.float32)[None, :], 1) + skip * x_
            tl.store(out + t * d + i, y.to(out.dtype.element_ty), mask=_inside(i, end, t, L))
        xs, dts, Bs, Cs = next_xs, next_dts, next_Bs, next_Cs
    if HAS_FINAL:
        tl.store(final + b * d * N + place, state, mask=ok)


@triton.jit
def _gradient_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, states, dy, d_final, dx, d_dt, dA, dB, dC, dD, d_bias, d_initial,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, dy_sb, dy_sl, L, d, chunks, blocks,
    GROUP: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and d_dt (B, L, d); sums over tokens dA (B, d, N), dD and d_bias (B, d); sums over a program's channels dB and
    dC (B, L, blocks, N); and the gradient of the initial state (B, d, N)."""
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    per_group = (GROUP + BLOCK_D - 1) // BLOCK_D
    first = block // per_group * GROUP
    i = first + block % per_group * BLOCK_D + tl.arange(0, BLOCK_D)
    n = _states(BLOCK_N)
    end = first + GROUP
    i_ok, n_ok = i < end, n < N
    ok = i_ok[:, None] & n_ok[None, :]
    place = i[:, None] * N + n[None, :]
    x += b * x_sb
    dt += b * dt_sb
    dy += b * dy_sb
    B += b * B_sb + first // SB * B_sg
    C += b * C_sb + first // SC * C_sg
    dx += b * L * d
    d_dt += b * L * d
    dB += (b * L * blocks + block) * N
    dC += (b * L * blocks + block) * N
    if HAS_SEQ:
        seq_idx += b * seq_sb
    rates = tl.load(A + place, mask=ok, other=0.0).to(tl.float32) * LOG2E
    bias, skip = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + i, mask=i_ok, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + i, mask=i_ok, other=0.0).to(tl.float32)
    G = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_FINAL:
        G = tl.load(d_final + b * d * N + place, mask=ok, other=0.0).to(tl.float32)
    dA_ = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dD_, d_bias_ = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, chunks):
        c = tl.cast(chunks - 1 - k, tl.int64)
        start = c * Q
        state = tl.load(states + (b * chunks + c) * d * N + place, mask=ok, other=0.0).to(tl.float32)
        xs, dts = _tokens(x, x_sl, start, L, i, end, Q), _tokens(dt, dt_sl, start, L, i, end, Q)
        Bs, Cs = _tokens(B, B_sl, start, L, n, N, Q), _tokens(C, C_sl, start, L, n, N, Q)
        dys = _tokens(dy, dy_sl, start, L, i, end, Q)
        hs, steps = (state,), ()
        for q in tl.static_range(Q):
            t = start + q
            step = _step(dts[q], bias, _inside(i, end, t, L), SOFTPLUS)
            added = (step * xs[q].to(tl.float32))[:, None] * Bs[q].to(tl.float32)[None, :]
            state = _decay(step, rates, seq_idx, seq_sl, t, L, HAS_SEQ) * state + added
            hs += (state,)
            steps += (step,)
        for q in tl.static_range(Q - 1, -1, -1):
            t = start + q
            x_, dy_, step = xs[q].to(tl.float32), dys[q].to(tl.float32), steps[q]
            G += dy_[:, None] * Cs[q].to(tl.float32)[None, :]
            dC_ = tl.sum(dy_[:, None] * hs[q + 1], 0)
            dB_ = tl.sum(G * (step * x_)[:, None], 0)
            tl.store(dC + t * blocks * N + n, dC_.to(dC.dtype.element_ty), mask=_inside(n, N, t, L))
            tl.store(dB + t * blocks * N + n, dB_.to(dB.dtype.element_ty), mask=_inside(n, N, t, L))
            written = tl.sum(G * Bs[q].to(tl.float32)[None, :], 1)
            G *= _decay(step, rates, seq_idx, seq_sl, t, L, HAS_SEQ)  # from here on, of the state before the token
            kept = G * hs[q]
            dA_ += kept * step[:, None]
            d_step = x_ * written + tl.sum(kept * rates, 1) / LOG2E
            if SOFTPLUS:
                d_step *= tl.sigmoid(dts[q].to(tl.float32) + bias)
            d_step = tl.where(_inside(i, end, t, L), d_step, 0.0)
            d_x = step * written + skip * dy_
            tl.store(d_dt + t * d + i, d_step.to(d_dt.dtype.element_ty), mask=_inside(i, end, t, L))
            tl.store(dx + t * d + i, d_x.to(dx.dtype.element_ty), mask=_inside(i, end, t, L))
            dD_ += dy_ * x_
            d_bias_ += d_step
    tl.store(d_initial + b * d * N + place, G, mask=ok)
    tl.store(dA + b * d * N + place, dA_, mask=ok)
    if HAS_D:
        tl.store(dD + b * d + i, dD_, mask=i_ok)
    if HAS_BIAS:
        tl.store(d_bias + b * d + i, d_bias_, mask=i_ok)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class _Inputs(NamedTuple):
    """The first arguments of selective_scan."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    seq_idx: Tensor | None


class _Scan:
    """What the launches of one scan share."""

    def __init__(self, inputs, dt_softplus):
        x, dt, A, B, C, D, dt_bias, seq_idx = inputs
        self.batch, self.length, self.d = x.shape
        self.N = A.shape[1]
        self.chunks = -(-self.length // CHUNK)
        self.shares = {"SB": self.d // B.shape[2], "SC": self.d // C.shape[2]}
        self.group = math.gcd(*self.shares.values())  # so many channels are of one group of B, and of C
        self.strides = (
            *x.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3],
            *((0, 0) if seq_idx is None else seq_idx.stride()),
        )  # fmt: skip
        self.sizes = self.length, self.d, self.chunks
        self.common = self.shares | {
            "N": self.N, "Q": CHUNK, "HAS_D": D is not None, "HAS_BIAS": dt_bias is not None,
            "HAS_SEQ": seq_idx is not None, "SOFTPLUS": dt_softplus, "BLOCK_N": power_of_2(self.N),
        }  # fmt: skip

    def config(self, backward):
        """Launch parameters, and how many programs they give each sequence."""
        options = config(self.N, backward)
        options["BLOCK_D"] = min(options["BLOCK_D"], power_of_2(self.group))
        return options, self.d // self.group * -(-self.group // options["BLOCK_D"])


def _forward(run, *args):
    *inputs, initial_state, dt_softplus, return_final_state, training = args
    inputs = _Inputs(*inputs)
    scan = _Scan(inputs, dt_softplus)
    batch, d, N = scan.batch, scan.d, scan.N
    out = run.new(batch, scan.length, d, dtype=inputs.x.dtype)
    states = run.new(*(batch, scan.chunks, d, N) if training else (0,), dtype=inputs.x.dtype)
    final = run.new(*(batch, d, N) if return_final_state else (0,))
    options, blocks = scan.config(backward=False)
    run(
        _scan_kernel, (batch * blocks,),
        *inputs, initial_state, out, states, final, *scan.strides, *scan.sizes, blocks,
        GROUP=scan.group, HAS_INITIAL=initial_state is not None, HAS_FINAL=return_final_state, SAVES=training,
        **scan.common, **options,
    )  # fmt: skip
    if training and run.dry:
        _gradients(run, out, None, *inputs, states, dt_softplus)
    return out, final, states


def _gradients(run, dy, d_final, *args):
    *inputs, states, dt_softplus = args
    inputs = _Inputs(*inputs)
    scan = _Scan(inputs, dt_softplus)
    batch, d, N = scan.batch, scan.d, scan.N
    options, blocks = scan.config(backward=True)
    dx, d_dt = run.like(inputs.x), run.like(inputs.dt)
    dA, d_initial = run.new(batch, d, N), run.new(batch, d, N)
    dD, d_bias = (run.new(*(0,) if t is None else (batch, d)) for t in (inputs.D, inputs.dt_bias))
    # Those that are sums of several programs' are float32 until then.
    dB, dC = (
        run.new(batch, scan.length, blocks, N, dtype=t.dtype if t.shape[2] == blocks else torch.float32)
        for t in (inputs.B, inputs.C)
    )
    run(
        _gradient_kernel, (batch * blocks,),
        *inputs, states, dy, d_final, dx, d_dt, dA, dB, dC, dD, d_bias, d_initial, *scan.strides, *dy.stride()[:2],
        *scan.sizes, blocks, GROUP=scan.group, HAS_FINAL=d_final is not None, **scan.common, **options,
    )  # fmt: skip
    return dx, d_dt, dA, dB, dC, dD, d_bias, d_initial


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def selective_scan_backward(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    states: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and dt_bias (empty where there is none), and float32 of the initial state."""
    dx, d_dt, dA, dB, dC, dD, d_bias, d_initial = launched(
        _gradients, inner_contiguous(dy), d_final, x, dt, A, B, C, D, dt_bias, seq_idx, states, dt_softplus,
    )  # fmt: skip
    dB, dC = (
        grad if t.shape == grad.shape else grad.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype)
        for t, grad in ((B, dB), (C, dC))
    )
    sums = (
        grad.new_empty(0) if t is None else grad.sum(0).to(t.dtype) for t, grad in ((A, dA), (D, dD), (dt_bias, d_bias))
    )
    dA, dD, d_bias = sums
    return dx, d_dt, dA, dB, dC, dD, d_bias, d_initial


def _fake_gradients(dy, d_final, x, dt, A, B, C, D, dt_bias, seq_idx, states, dt_softplus):
    dx, d_dt, dA, dB, dC = (t.new_empty(t.shape) for t in (x, dt, A, B, C))
    dD, d_bias = (x.new_empty(0, dtype=torch.float32) if t is None else t.new_empty(t.shape) for t in (D, dt_bias))
    return dx, d_dt, dA, dB, dC, dD, d_bias, x.new_empty(len(x), *A.shape, dtype=torch.float32)


selective_scan_backward = CustomOp(
    selective_scan_backward, _fake_gradients, **once("selective_scan", remedy="; backend='torch' can")
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    return_final_state: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan; see transpoint.kernels.selective. x, dt, B and C contiguous in their last dimension, A, D, dt_bias and
    the initial state wholly.

    Returns:
        out (B, L, d) and the final state (B, d, N), empty unless asked for; and for the backward pass, empty unless
        training, the states entering the chunks (B, chunks, d, N).
    """
    return launched(
        _forward, x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, dt_softplus, return_final_state, training,
    )  # fmt: skip


def _fake(x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, dt_softplus, return_final_state, training):
    batch, length, _ = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, *A.shape) if return_final_state else (0,), dtype=torch.float32),
        x.new_empty((batch, (length + CHUNK - 1) // CHUNK, *A.shape) if training else (0,)),
    )


def _save(ctx, inputs, output):
    *inputs, initial_state, ctx.dt_softplus, _, _ = inputs
    ctx.set_materialize_grads(False)  # else zeros are made for the states, which are only for the backward pass
    ctx.save_for_backward(*inputs, output[2])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, dy, d_final, _):
    x, _, _, _, _, D, dt_bias, *_ = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(x.shape)
    d_final = None if d_final is None else d_final.contiguous()
    dx, d_dt, dA, dB, dC, dD, d_bias, d_initial = selective_scan_backward(
        dy, d_final, *ctx.saved_tensors, ctx.dt_softplus
    )
    dD, d_bias = None if D is None else dD, None if dt_bias is None else d_bias
    d_initial = None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)
    return dx, d_dt, dA, dB, dC, dD, d_bias, None, d_initial, None, None, None


selective_scan = CustomOp(selective_scan, _fake, save=_save, gradients=_backward)
