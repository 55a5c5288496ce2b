"""Triton kernels of Mamba-1's selective scan, forward and backward, registered as torch custom ops.

Each number of a state has a recurrence of its own, h_t = a_t h_{t-1} + b_t, with a_t = exp(dt_t A) and
b_t = dt_t x_t B_t (Gu and Dao 2023, arXiv 2312.00752, section 3.3.2): no matrix unit can be used, and what is computed
of it (channels times N numbers for each token) stays in registers. Programs walk along the sequence by chunks of Q
tokens, each with a few channels; within a chunk an associative scan runs over the tokens.

With G_t the gradient of h_t, and a_{L+1} = 1 (differentiated by hand):

    G_t = dy_t C_t + a_{t+1} G_{t+1}                    e_t = h_t - b_t  (what token t has kept, a_t h_{t-1})
    dC_t = sum_i dy_t h_t        dB_t = sum_i G_t dt_t x_t        dx_t = dt_t G_t B_t + D dy_t
    d(dt)_t = x_t G_t B_t + sum_n G_t e_t A             dA = sum_t G_t e_t dt_t

    _scan_kernel       y, the states that enter the chunks, and the last one
    _gradient_kernel   the walk back, from the states that enter the chunks: all gradients

dB and dC are sums over the channels of a group. A program of the walk back goes through a slice of a group, a few
channels at a time, and what passes from chunk to chunk waits in memory; where there are several slices to a group,
their sums are added up afterwards, in an order that does not vary.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import inner_contiguous, power_of_2, sm_count
from .custom_op import CustomOp, once
from .launch import launched
from .ssd_triton import LOG2E, softplus

# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters

CHUNK = 16  # tokens
SLICE = 64  # the most channels that a program of the walk back goes through


def config(N: int, backward: bool) -> dict:
    """Channels at a time, so that registers hold the tiles, and warps.

    Chosen for few register spills on sm_90, as ptxas tells them; not timed.
    """
    numbers, warps = (2048, 4 if N <= 16 else 8) if backward else (4096, 4)
    return {"BLOCK_D": max(1, numbers // (CHUNK * power_of_2(N))), "num_warps": warps}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _then(a, b, a_, b_):
    """The recurrence h -> a h + b, and after it another one."""
    return a * a_, b * a_ + b_


@triton.jit
def _load(ptr, stride, row, column, row_ok, column_ok):
    """A tile of a matrix whose rows are contiguous, in float32; zeros elsewhere."""
    mask = row_ok[:, None] & column_ok[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, stride, row, column, row_ok, column_ok, value):
    mask = row_ok[:, None] & column_ok[None, :]
    tl.store(ptr + row[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_steps(dt, stride, bias, row, column, row_ok, column_ok, SOFTPLUS: tl.constexpr):
    """Steps before softplus, and steps: 0 past the end, which neither decay nor write."""
    raw = _load(dt, stride, row, column, row_ok, column_ok) + bias[None, :]
    step = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(row_ok[:, None] & column_ok[None, :], step, 0.0)


@triton.jit
def _resets(seq_idx, offset, stride, t, L, HAS_SEQ: tl.constexpr):
    """The logarithm of what becomes of the state at token t: -inf at the first of a document, and else 0."""
    if HAS_SEQ:
        inside = (t > 0) & (t < L)
        here = tl.load(seq_idx + offset + t * stride, mask=inside, other=0)
        before = tl.load(seq_idx + offset + (t - 1) * stride, mask=inside, other=0)
        return tl.where(here != before, -float("inf"), 0.0)
    else:
        return tl.zeros(t.shape, tl.float32)


@triton.jit
def _decays(step, rates, reset, HAS_SEQ: tl.constexpr):
    """Decays (Q, channels, N) from steps (Q, channels) and rates in base 2 (channels, N)."""
    log = step[:, :, None] * rates[None, :, :]
    return tl.exp2(log + reset[:, None, None] if HAS_SEQ else log)


@triton.jit
def _scan_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, initial, out, states, final,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, L, d, chunks, blocks,
    WIDTH: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr,
    SAVES: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, block = pid // blocks, pid % blocks
    per_slice = (WIDTH + BLOCK_D - 1) // BLOCK_D  # channels of a slice are of one group of B, and of C
    first = block // per_slice * WIDTH
    i = first + block % per_slice * BLOCK_D + tl.arange(0, BLOCK_D)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    i_ok, n_ok = i < first + WIDTH, n < N
    x += b * x_sb
    dt += b * dt_sb
    B += b * B_sb + first // SB * B_sg
    C += b * C_sb + first // SC * C_sg
    out += b * L * d
    rates = _load(A, N, i, n, i_ok, n_ok) * LOG2E
    bias, skip = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + i, mask=i_ok, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + i, mask=i_ok, other=0.0).to(tl.float32)
    state = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    if HAS_INITIAL:
        state = _load(initial + b * d * N, N, i, n, i_ok, n_ok)
    for k in range(0, chunks):
        c = tl.cast(k, tl.int64)
        t = c * Q + q
        t_ok = t < L
        if SAVES:
            _store(states + (b * chunks + c) * d * N, N, i, n, i_ok, n_ok, state)
        x_ = _load(x, x_sl, t, i, t_ok, i_ok)
        _, step = _load_steps(dt, dt_sl, bias, t, i, t_ok, i_ok, SOFTPLUS)
        B_ = _load(B, B_sl, t, n, t_ok, n_ok)
        C_ = _load(C, C_sl, t, n, t_ok, n_ok)
        reset = _resets(seq_idx, b * seq_sb, seq_sl, t, L, HAS_SEQ)
        decay = _decays(step, rates, reset, HAS_SEQ)
        added = (step * x_)[:, :, None] * B_[:, None, :]
        added += tl.where((q == 0)[:, None, None], decay * state[None, :, :], 0.0)
        _, h = tl.associative_scan((decay, added), 0, _then)
        _store(out, d, t, i, t_ok, i_ok, tl.sum(h * C_[:, None, :], 2) + skip[None, :] * x_)
        state = tl.sum(tl.where((q == Q - 1)[:, None, None], h, 0.0), 0)
    if HAS_FINAL:
        _store(final + b * d * N, N, i, n, i_ok, n_ok, state)


@triton.jit
def _gradient_kernel(
    x, dt, A, B, C, D, dt_bias, seq_idx, states, dy, d_final, dx, d_dt, dA, dB, dC, dD, d_bias, adjoints,
    x_sb, x_sl, dt_sb, dt_sl, B_sb, B_sl, B_sg, C_sb, C_sl, C_sg, seq_sb, seq_sl, dy_sb, dy_sl, L, d, chunks, slices,
    width, GROUP: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and d_dt (B, L, d); sums over tokens dA (B, d, N), dD and d_bias (B, d); sums over the channels of a slice dB
    and dC (B, L, slices, N); and in adjoints (B, d, N) what passes from chunk to chunk, at last the gradient of the
    initial state. A constant width would have loops unrolled, at many registers."""
    pid = tl.program_id(0).to(tl.int64)
    b, piece = pid // slices, pid % slices
    per_group = (GROUP + width - 1) // width
    group = piece // per_group * GROUP
    first = group + piece % per_group * width
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    n_ok = n < N
    x += b * x_sb
    dt += b * dt_sb
    dy += b * dy_sb
    B += b * B_sb + first // SB * B_sg
    C += b * C_sb + first // SC * C_sg
    for k in range(0, chunks):
        c = tl.cast(chunks - 1 - k, tl.int64)
        t = c * Q + q
        t_ok = t < L
        B_ = _load(B, B_sl, t, n, t_ok, n_ok)
        C_ = _load(C, C_sl, t, n, t_ok, n_ok)
        reset = _resets(seq_idx, b * seq_sb, seq_sl, t, L, HAS_SEQ)
        reset_after = _resets(seq_idx, b * seq_sb, seq_sl, t + 1, L, HAS_SEQ)
        dB_ = tl.zeros((Q, BLOCK_N), tl.float32)
        dC_ = tl.zeros((Q, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_D):
            i = first + start + tl.arange(0, BLOCK_D)
            i_ok = (i < first + width) & (i < group + GROUP)
            rates = _load(A, N, i, n, i_ok, n_ok) * LOG2E
            bias, skip = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
            if HAS_BIAS:
                bias = tl.load(dt_bias + i, mask=i_ok, other=0.0).to(tl.float32)
            if HAS_D:
                skip = tl.load(D + i, mask=i_ok, other=0.0).to(tl.float32)
            x_ = _load(x, x_sl, t, i, t_ok, i_ok)
            dy_ = _load(dy, dy_sl, t, i, t_ok, i_ok)
            raw, step = _load_steps(dt, dt_sl, bias, t, i, t_ok, i_ok, SOFTPLUS)

            # The states, forwards.
            decay = _decays(step, rates, reset, HAS_SEQ)
            added = (step * x_)[:, :, None] * B_[:, None, :]
            state = _load(states + (b * chunks + c) * d * N, N, i, n, i_ok, n_ok)
            entering = tl.where((q == 0)[:, None, None], decay * state[None, :, :], 0.0)
            _, h = tl.associative_scan((decay, added + entering), 0, _then)
            dC_ += tl.sum(dy_[:, :, None] * h, 1)
            kept = h - added

            # Their gradients, backwards.
            _, after = _load_steps(dt, dt_sl, bias, t + 1, i, t + 1 < L, i_ok, SOFTPLUS)
            passing = _decays(after, rates, reset_after, HAS_SEQ)
            at = b * d * N
            adjoint = _load(adjoints + at, N, i, n, i_ok & (k > 0), n_ok)
            if HAS_FINAL:
                adjoint += _load(d_final + at, N, i, n, i_ok & (k == 0), n_ok)
            leaving = tl.where((q == Q - 1)[:, None, None], passing * adjoint[None, :, :], 0.0)
            read = dy_[:, :, None] * C_[:, None, :]
            _, G = tl.associative_scan((passing, read + leaving), 0, _then, reverse=True)
            dB_ += tl.sum(G * (step * x_)[:, :, None], 1)
            through = tl.where(c == 0, decay, 1.0)  # the gradient of the state before the first token
            adjoint = tl.sum(tl.where((q == 0)[:, None, None], through * G, 0.0), 0)
            _store(adjoints + at, N, i, n, i_ok, n_ok, adjoint)

            written = tl.sum(G * B_[:, None, :], 2)
            kept *= G
            d_step = x_ * written + tl.sum(kept * rates[None, :, :], 2) / LOG2E
            if SOFTPLUS:
                d_step *= tl.sigmoid(raw)
            d_step = tl.where(t_ok[:, None], d_step, 0.0)
            _store(d_dt + b * L * d, d, t, i, t_ok, i_ok, d_step)
            _store(dx + b * L * d, d, t, i, t_ok, i_ok, step * written + skip[None, :] * dy_)
            d_rate = tl.sum(kept * step[:, :, None], 0)
            _store(dA + at, N, i, n, i_ok, n_ok, d_rate + _load(dA + at, N, i, n, i_ok & (k > 0), n_ok))
            for_sum = b * d + i
            if HAS_D:
                before = tl.load(dD + for_sum, mask=i_ok & (k > 0), other=0.0)
                tl.store(dD + for_sum, before + tl.sum(dy_ * x_, 0), mask=i_ok)
            if HAS_BIAS:
                before = tl.load(d_bias + for_sum, mask=i_ok & (k > 0), other=0.0)
                tl.store(d_bias + for_sum, before + tl.sum(d_step, 0), mask=i_ok)
        _store(dB + (b * L * slices + piece) * N, slices * N, t, n, t_ok, n_ok, dB_)
        _store(dC + (b * L * slices + piece) * N, slices * N, t, n, t_ok, n_ok, dC_)
        tl.debug_barrier()  # what this chunk has left in memory is read by the next, perhaps in other threads


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
        options = config(self.N, backward)
        return options | {"BLOCK_D": min(options["BLOCK_D"], power_of_2(self.group))}

    def slice(self, block, device):
        """How many channels a program of the walk back goes through: fewer where programs are fewer than
        multiprocessors."""
        width = min(SLICE, self.group)
        while width > block and self.batch * self.d // width < sm_count(device):
            width = max(block, width // 2)
        return width


def _forward(run, *args):
    *inputs, initial_state, dt_softplus, return_final_state, training = args
    inputs = _Inputs(*inputs)
    scan = _Scan(inputs, dt_softplus)
    batch, d, N = scan.batch, scan.d, scan.N
    out = run.new(batch, scan.length, d, dtype=inputs.x.dtype)
    states = run.new(*(batch, scan.chunks, d, N) if training else (0,), dtype=inputs.x.dtype)
    final = run.new(*(batch, d, N) if return_final_state else (0,))
    options = scan.config(backward=False)
    blocks = d // scan.group * -(-scan.group // options["BLOCK_D"])
    run(
        _scan_kernel, (batch * blocks,),
        *inputs, initial_state, out, states, final, *scan.strides, *scan.sizes, blocks,
        WIDTH=scan.group, HAS_INITIAL=initial_state is not None, HAS_FINAL=return_final_state, SAVES=training,
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
    options = scan.config(backward=True)
    width = scan.slice(options["BLOCK_D"], dy.device)
    slices = d // scan.group * -(-scan.group // width)
    dx, d_dt = run.like(inputs.x), run.like(inputs.dt)
    dA, adjoints = run.new(batch, d, N), run.new(batch, d, N)
    dD, d_bias = (run.new(*(0,) if t is None else (batch, d)) for t in (inputs.D, inputs.dt_bias))
    # Those that are sums of several slices are float32 until then.
    dB, dC = (
        run.new(batch, scan.length, slices, N, dtype=t.dtype if t.shape[2] == slices else torch.float32)
        for t in (inputs.B, inputs.C)
    )
    run(
        _gradient_kernel, (batch * slices,),
        *inputs, states, dy, d_final, dx, d_dt, dA, dB, dC, dD, d_bias, adjoints, *scan.strides, *dy.stride()[:2],
        *scan.sizes, slices, width, GROUP=scan.group, HAS_FINAL=d_final is not None, **scan.common, **options,
    )  # fmt: skip
    return dx, d_dt, dA, dB, dC, dD, d_bias, adjoints


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
