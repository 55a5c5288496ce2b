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
from .ssd_triton import LOG2E

# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters

CHUNK = 8  # tokens whose states the walk back holds in registers: of the states, one in so many is saved
NUMBERS = 4  # of a state, in a thread: what it reads at once in float32
# Channels of a thread, and of a program, which writes one sum over them for each token and number of dB and dC. Half as
# many are more warps to hide latency, at a tenth more instructions. A thread's must be 4 at most: see _laid_out.
FORWARD = 4, 32
BACKWARD = 4, 32


def config(N: int, group: int, backward: bool) -> dict:
    """How the numbers of `group` channels are shared out: to LANES by those of a state and to ROWS by channels.

    Chosen for few instructions and register spills on sm_90, as ptxas tells them; not timed.
    """
    channels, block = BACKWARD if backward else FORWARD
    numbers = min(NUMBERS, power_of_2(N))
    lanes, rows = power_of_2(N) // numbers, min(block // channels, power_of_2(-(-group // channels)))
    shares = {"LANES": lanes, "ROWS": rows, "CHANNELS": channels, "NUMBERS": numbers}
    return shares | {"num_warps": max(1, lanes * rows // 32), "num_stages": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
#
# Tiles are (LANES, ROWS, CHANNELS, NUMBERS): the first two dimensions lie across the threads of a warp (ROWS, across
# warps too), the last two in the registers of each. What has no numbers of the state is (LANES, ROWS, CHANNELS), what
# has no channels is (LANES, ROWS, NUMBERS). Triton gives tiles that layout because it is how memory is read best; see
# _laid_out. So nothing has to move between threads but what is summed. What is costly and differs by channel and token
# only, as softplus, is computed for LANES tokens at a time, each in lanes of its own.


@triton.jit
def _channels(first, LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = first + tl.arange(0, ROWS)[None, :, None] * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    return tl.broadcast_to(row, (LANES, ROWS, CHANNELS))


@triton.jit
def _numbers(LANES: tl.constexpr, ROWS: tl.constexpr, NUMBERS: tl.constexpr):
    lane = tl.arange(0, LANES)[:, None, None] * NUMBERS + tl.arange(0, NUMBERS)[None, None, :]
    return tl.broadcast_to(lane, (LANES, ROWS, NUMBERS))


@triton.jit
def _laid_out(ptr, offset):
    """ptr + offset. Triton shares a tile of pointers out by contiguity: the dimension with most to a thread, the others
    across threads in that order. Only that of the last dimension, which alone decides how wide accesses are, is true;
    the others put LANES before ROWS. Where they are equal, the order depends on Triton's version."""
    place = ptr + offset
    if place.shape[-1] >= 4:
        if len(place.shape) == 4:
            place = tl.max_contiguous(place, [3, 2, 1, 4])
        else:
            place = tl.max_contiguous(place, [2, 1, 4])
    return place


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(_laid_out(ptr, offset), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offset, value, mask):
    tl.store(_laid_out(ptr, offset), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inside(column, end, t, L):
    """Which columns of row t there are: those before `end`, and none past the last row."""
    return column < tl.where(t < L, end, 0)


@triton.jit
def _tokens(ptr, stride, start, L, column, end, Q: tl.constexpr):
    """Q rows from `start` on, as they are, all loaded before any is used; zeros past the end."""
    place = _laid_out(ptr, column)
    rows = ()
    for q in tl.static_range(Q):
        t = start + q
        rows += (tl.load(place + t * stride, mask=column < tl.where(t < L, end, 0), other=0.0),)
    return rows


@triton.jit
def _tokens_by_lane(ptr, stride, start, L, column, end, Q: tl.constexpr, LANES: tl.constexpr):
    """Q rows from `start` on, each in a lane: tiles of LANES rows; zeros past the end."""
    tiles = ()
    for q in tl.static_range(0, Q, LANES):
        t = start + q + tl.arange(0, LANES)[:, None, None]
        tiles += (tl.load(_laid_out(ptr, t * stride + column), mask=_inside(column, end, t, L), other=0.0),)
    return tiles


@triton.jit
def _softplus(x):
    """log(1 + u) = 2 artanh(u / (2 + u)), of which eight terms are float32's precision: fewer instructions than log."""
    u = tl.exp(-tl.abs(x))
    v = u / (2.0 + u)
    square = v * v
    series = 1 / 15 * square + 1 / 13
    series = series * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    return tl.maximum(x, 0.0) + 2.0 * (v + v * (square * series))


@triton.jit
def _steps(dts, bias, start, L, i, end, Q: tl.constexpr, LANES: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Steps of what _tokens_by_lane has loaded: 0 past the end, which neither decay nor write."""
    steps = ()
    for q in tl.static_range(0, Q, LANES):
        t = start + q + tl.arange(0, LANES)[:, None, None]
        raw = dts[q // LANES].to(tl.float32) + bias
        steps += (tl.where(_inside(i, end, t, L), _softplus(raw) if SOFTPLUS else raw, 0.0),)
    return steps


@triton.jit
def _add(a, b, a_, b_):
    return a + a_, b + b_


@triton.jit
def _decay(step, rates, seq_idx, stride, t, L, HAS_SEQ: tl.constexpr):
    """Decays from steps and rates in base 2; 0 at the first token of a document."""
    log = step[:, :, :, None] * rates
    if HAS_SEQ:
        inside = (t > 0) & (t < L)
        here = tl.load(seq_idx + t * stride, mask=inside, other=0)
        before = tl.load(seq_idx + (t - 1) * stride, mask=inside, other=0)
        log += tl.where(here != before, -float("inf"), 0.0)
    return tl.exp2(log)


@triton.jit
def _program(
    blocks, GROUP: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """A program's row of the batch and its block of channels, all of one group of B, and of C; that group's first
    channel, and the one after its last; and tiles of channels, of numbers, of places in (d, N), of which ones count."""
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    per_group = (GROUP + ROWS * CHANNELS - 1) // (ROWS * CHANNELS)
    group = block // per_group * GROUP
    end = group + GROUP
    i = _channels(group + block % per_group * (ROWS * CHANNELS), LANES, ROWS, CHANNELS)
    n = _numbers(LANES, ROWS, NUMBERS)
    place = i[:, :, :, None] * N + n[:, :, None, :]
    ok = (i < end)[:, :, :, None] & (n < N)[:, :, None, :]
    return b, block, group, end, i, n, place, ok


@triton.jit
def _scan_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, initial, out, states, final,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, L, d, chunks, blocks,
    GROUP: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    SAVES: tl.constexpr, SOFTPLUS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    b, block, group, end, i, n, place, ok = _program(blocks, GROUP, N, LANES, ROWS, CHANNELS, NUMBERS)
    x += b * x_sb
    dt += b * dt_sb
    B += b * B_sb + group // SB * B_sg
    C += b * C_sb + group // SC * C_sg
    out += b * L * d
    if HAS_SEQ:
        seq_idx += b * seq_sb
    lane = tl.arange(0, LANES)[:, None, None]
    rates = _load(A, place, ok) * LOG2E
    bias = _load(dt_bias, i, i < end) if HAS_BIAS else tl.zeros(i.shape, tl.float32)
    skip = _load(D, i, i < end) if HAS_D else tl.zeros(i.shape, tl.float32)
    state = _load(initial + b * d * N, place, ok) if HAS_INITIAL else tl.zeros(place.shape, tl.float32)
    start = tl.cast(0, tl.int64)
    dts = _tokens_by_lane(dt, dt_sl, start, L, i, end, Q, LANES)
    xs = _tokens(x, x_sl, start, L, i, end, Q)
    Bs, Cs = _tokens(B, B_sl, start, L, n, N, Q), _tokens(C, C_sl, start, L, n, N, Q)
    for k in range(0, chunks):
        start = tl.cast(k, tl.int64) * Q
        if SAVES:
            _store(states + (b * chunks + k) * d * N, place, state, ok)
        # The next chunk's inputs travel while this one is computed.
        after = start + Q
        next_dts = _tokens_by_lane(dt, dt_sl, after, L, i, end, Q, LANES)
        next_xs = _tokens(x, x_sl, after, L, i, end, Q)
        next_Bs, next_Cs = _tokens(B, B_sl, after, L, n, N, Q), _tokens(C, C_sl, after, L, n, N, Q)
        steps = _steps(dts, bias, start, L, i, end, Q, LANES, SOFTPLUS)
        y = tl.zeros(i.shape, tl.float32)
        for q in tl.static_range(Q):
            t = start + q
            x_ = xs[q].to(tl.float32)
            step = tl.gather(steps[q // LANES], tl.full(i.shape, q % LANES, tl.int32), 0)  # in all lanes
            added = (step * x_)[:, :, :, None] * Bs[q].to(tl.float32)[:, :, None, :]
            state = _decay(step, rates, seq_idx, seq_sl, t, L, HAS_SEQ) * state + added
            read = tl.sum(tl.sum(state * Cs[q].to(tl.float32)[:, :, None, :], 3), 0)[None, :, :]
            y = tl.where(lane == q % LANES, read + skip * x_, y)
            if q % LANES == LANES - 1 or q == Q - 1:
                t = start + q // LANES * LANES + lane
                _store(out, t * d + i, y, _inside(i, end, t, L) & (lane <= q % LANES))
        dts, xs, Bs, Cs = next_dts, next_xs, next_Bs, next_Cs
    if HAS_FINAL:
        _store(final + b * d * N, place, state, ok)


@triton.jit
def _gradient_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, states, dy, d_final, dx, d_dt, dA, dB, dC, dD, d_bias, d_initial,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, dy_sb, dy_sl, L, d, chunks, blocks,
    GROUP: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr, SOFTPLUS: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """dx and d_dt (B, L, d); sums over tokens dA (B, d, N), dD and d_bias (B, d); sums over a program's channels dB and
    dC (B, L, blocks, N); and the gradient of the initial state (B, d, N)."""
    b, block, group, end, i, n, place, ok = _program(blocks, GROUP, N, LANES, ROWS, CHANNELS, NUMBERS)
    x += b * x_sb
    dt += b * dt_sb
    dy += b * dy_sb
    B += b * B_sb + group // SB * B_sg
    C += b * C_sb + group // SC * C_sg
    dx += b * L * d
    d_dt += b * L * d
    dB += (b * L * blocks + block) * N
    dC += (b * L * blocks + block) * N
    if HAS_SEQ:
        seq_idx += b * seq_sb
    lane = tl.arange(0, LANES)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    rates = _load(A, place, ok) * LOG2E
    bias = _load(dt_bias, i, i < end) if HAS_BIAS else tl.zeros(i.shape, tl.float32)
    skip = _load(D, i, i < end) if HAS_D else tl.zeros(i.shape, tl.float32)
    G = _load(d_final + b * d * N, place, ok) if HAS_FINAL else tl.zeros(place.shape, tl.float32)
    dBs, dCs = _laid_out(dB, n), _laid_out(dC, n)
    dA_ = tl.zeros(place.shape, tl.float32)
    dD_, d_bias_ = tl.zeros(i.shape, tl.float32), tl.zeros(i.shape, tl.float32)
    for k in range(0, chunks):
        c = tl.cast(chunks - 1 - k, tl.int64)
        start = c * Q
        state = _load(states + (b * chunks + c) * d * N, place, ok)
        dts = _tokens_by_lane(dt, dt_sl, start, L, i, end, Q, LANES)
        xs = _tokens(x, x_sl, start, L, i, end, Q)
        Bs, Cs = _tokens(B, B_sl, start, L, n, N, Q), _tokens(C, C_sl, start, L, n, N, Q)
        dys = _tokens(dy, dy_sl, start, L, i, end, Q)
        steps = _steps(dts, bias, start, L, i, end, Q, LANES, SOFTPLUS)
        hs = (state,)
        for q in tl.static_range(Q):
            step = tl.gather(steps[q // LANES], tl.full(i.shape, q % LANES, tl.int32), 0)  # in all lanes
            added = (step * xs[q].to(tl.float32))[:, :, :, None] * Bs[q].to(tl.float32)[:, :, None, :]
            state = _decay(step, rates, seq_idx, seq_sl, start + q, L, HAS_SEQ) * state + added
            hs += (state,)
        # Read again, so that decays are computed again: the compiler would keep them all, where no register is free.
        rates = _load(A, place, ok) * LOG2E
        d_x, d_step = tl.zeros(i.shape, tl.float32), tl.zeros(i.shape, tl.float32)
        for q in tl.static_range(Q - 1, -1, -1):
            t = start + q
            x_, dy_ = xs[q].to(tl.float32), dys[q].to(tl.float32)
            step = tl.gather(steps[q // LANES], tl.full(i.shape, q % LANES, tl.int32), 0)  # in all lanes
            G += dy_[:, :, :, None] * Cs[q].to(tl.float32)[:, :, None, :]
            dB_ = tl.sum(G * (step * x_)[:, :, :, None], 2)
            dC_ = tl.sum(hs[q + 1] * dy_[:, :, :, None], 2)
            dB_, dC_ = tl.reduce((dB_, dC_), 1, _add)
            dB_, dC_ = tl.broadcast_to(dB_[:, None, :], n.shape), tl.broadcast_to(dC_[:, None, :], n.shape)
            once = (n < tl.where(t < L, N, 0)) & (row == 0)
            tl.store(dBs + t * blocks * N, dB_.to(dB.dtype.element_ty), mask=once)
            tl.store(dCs + t * blocks * N, dC_.to(dC.dtype.element_ty), mask=once)
            written = tl.sum(G * Bs[q].to(tl.float32)[:, :, None, :], 3)
            G *= _decay(step, rates, seq_idx, seq_sl, t, L, HAS_SEQ)  # from here on, of the state before the token
            kept = G * hs[q]
            dA_ += kept * step[:, :, :, None]
            written, decayed = tl.reduce((written, tl.sum(kept * rates, 3)), 0, _add)
            written, decayed = written[None, :, :], decayed[None, :, :]
            d_x = tl.where(lane == q % LANES, step * written + skip * dy_, d_x)
            d_step = tl.where(lane == q % LANES, x_ * written + decayed / LOG2E, d_step)
            dD_ += dy_ * x_
            if q % LANES == 0:
                t = start + q + lane
                inside = _inside(i, end, t, L) & (lane < Q - q)
                if SOFTPLUS:
                    d_step *= tl.sigmoid(dts[q // LANES].to(tl.float32) + bias)
                d_step = tl.where(inside, d_step, 0.0)
                d_bias_ += d_step
                _store(d_dt, t * d + i, d_step, inside)
                _store(dx, t * d + i, d_x, inside)
    _store(d_initial + b * d * N, place, G, ok)
    _store(dA + b * d * N, place, dA_, ok)
    once = (i < end) & (lane == 0)
    if HAS_D:
        _store(dD + b * d, i, dD_, once)
    if HAS_BIAS:
        _store(d_bias + b * d, i, tl.broadcast_to(tl.sum(d_bias_, 0)[None, :, :], i.shape), once)


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
            "HAS_SEQ": seq_idx is not None, "SOFTPLUS": dt_softplus,
        }  # fmt: skip

    def config(self, backward):
        """Launch parameters, and how many programs they give each sequence."""
        options = config(self.N, self.group, backward)
        return options, self.d // self.group * -(-self.group // (options["ROWS"] * options["CHANNELS"]))


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
