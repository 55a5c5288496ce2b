"""Triton kernels of the Mamba-2 scan, forward and backward, registered as torch custom ops.

With chunks of Q tokens, b_t the sum of the log decays from the start of t's chunk to t, S the state that enters a chunk
and G the gradient of the state that leaves it (Dao and Gu 2024, arXiv 2405.21060, section 6; differentiated by hand):

    M_ts = C_t.B_s dt_s exp(b_t - b_s)  (s <= t)
    y    = M x + exp(b) C S^T                            S' = exp(b_Q) S + x^T (exp(b_Q - b) dt B)
    dx   = M^T dy + exp(b_Q - b) dt B G^T                G' = exp(b_Q) G + dy^T (exp(b) C)
    dC   = (dy x^T * decays) B + exp(b) dy S             dB = (dy x^T * decays)^T C + exp(b_Q - b) dt x G

The forward pass walks over the chunks with the state in registers and, for training, leaves S of every chunk. The
backward pass walks back and leaves G of every chunk; then the chunks are independent, and one program takes one chunk
for all the heads that share an operand, whose gradients it sums in registers.

    _steps_kernel       step sizes and decays, for all that follow
    _state_kernel       a walk that only finds states: S, G, or what a segment adds to them
    _forward_kernel     the walk that finds outputs
    _backward_kernel    all gradients of a chunk
    where heads have one B and C between them (the usual Mamba-2), so that their scores C.B are computed once a chunk:
    _output_kernel      outputs of a chunk from S, in training
    _entering_kernel    what S gives dC; _leaving_kernel: what G gives dx and dB; _within_kernel: the rest, inside a
                        chunk (one kernel for all three has too few registers)

Where batch and heads are too few to fill the GPU, walks are cut into segments: a first _state_kernel finds what each
part of a segment adds to the state, and _segments_kernel the states that enter the segments.

Exponents are in base 2, and differences are taken before the exponential: they are <= 0, so nothing overflows.
A program must not spill registers: what it spills goes to the L1 cache, of which its tiles leave little.
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

LOG2E = tl.constexpr(1.4426950408889634)
SLOTS = 2  # parts of a segment that are summed up by programs of their own


# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters


def chunk_length(state: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """Tokens per chunk: a power of two from 16 to 128, at most chunk_size if that is given."""
    if chunk_size is None:
        chunk_size = 32 if state > 64 and dtype == torch.float32 else 64  # what shared memory holds
    return min(128, max(16, 2 ** int(math.log2(chunk_size))))


def part_size(P: int, N: int) -> int:
    """The most rows of a state that the kernels handle at a time: registers hold a state of 8192 numbers."""
    return 64 if N <= 128 else 32


def config(kernel: str, N: int) -> dict:
    """Warps and pipeline stages of a kernel: the fastest without register spills to speak of, on an H200."""
    stages = {"forward": 3 if N <= 64 else 2, "backward": 2}
    return {"num_warps": 4, "num_stages": stages.get(kernel, 3)}


def loop_stages(N: int) -> int:
    """Stages of loops over heads: how many heads' tiles are loaded at a time."""
    # With N = 256, Triton 3.6 lets loads overwrite tiles that products still read: some runs then give a wrong dC.
    return 3 if N <= 128 else 1


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def softplus(x):
    # log(1 + u) loses u's low bits where u is small; (1 + u) - 1 is what is left of u, and puts them back.
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _steps_kernel(
    dt, dt_bias, A, seq_idx, steps, documents,
    dt_sb, dt_sl, dt_sh, seq_sb, seq_sl, L, H, chunks,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Pairs (B, H, chunks * Q, 2) of step size and summed log2 decay in the chunk; and changes of document in it."""
    pid = tl.program_id(0)
    b, c = (pid // chunks).to(tl.int64), (pid % chunks).to(tl.int64)
    t = c * Q + tl.arange(0, Q)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (t < L)[:, None] & (h < H)[None, :]
    value = tl.load(dt + b * dt_sb + t[:, None] * dt_sl + h[None, :] * dt_sh, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(dt_bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        value = softplus(value)
    value = tl.where(mask, value, 0.0)  # tokens past the end add nothing and decay nothing
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * LOG2E
    place = ((b * H + h[None, :]) * chunks * Q + t[:, None]) * 2
    tl.store(steps + place, value, mask=(h < H)[None, :])
    tl.store(steps + place + 1, tl.cumsum(value * rate[None, :], 0), mask=(h < H)[None, :])
    if HAS_SEQ:
        if tl.program_id(1) == 0:
            inside = (t < L) & (t > 0)
            here = tl.load(seq_idx + b * seq_sb + t * seq_sl, mask=inside, other=0)
            before = tl.load(seq_idx + b * seq_sb + (t - 1) * seq_sl, mask=inside, other=0)
            tl.store(documents + b * chunks * Q + t, tl.cumsum((here != before).to(tl.int32), 0))


@triton.jit
def _load(ptr, stride, row, column, rows, columns):
    """A tile of a matrix whose rows are contiguous; zeros beyond its end."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, stride, row, column, rows, columns, value):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(ptr + row[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _place(pid, chunks, units):
    """Batch row, chunk, and unit of heads of a program: units of one chunk are neighbours."""
    return (pid // units // chunks).to(tl.int64), (pid // units % chunks).to(tl.int64), pid % units


@triton.jit
def _load_steps(steps, Q: tl.constexpr):
    """Step sizes and decays of a chunk, and the decay at its end."""
    # In one tile: two small ones would be loaded anew in every layout they are used in, at many registers each.
    pairs = tl.load(steps + 2 * tl.arange(0, Q)[:, None] + tl.arange(0, 2)[None, :])
    step, decay = tl.split(pairs)
    return step, decay, tl.load(steps + 2 * Q - 1)


@triton.jit
def _state_kernel(
    u, v, steps, documents, entering, final, states, totals, total_decays,
    u_sb, u_sl, u_sh, v_sb, v_sl, v_sh, L, H, chunks, parts, per_part,
    SU: tl.constexpr, SV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    REVERSE: tl.constexpr, TOTALS: tl.constexpr, HAS_ENTERING: tl.constexpr, HAS_FINAL: tl.constexpr,
    STATES: tl.constexpr, HAS_SEQ: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one part of a sequence, state += u^T (weights * v), forward or back.

    Forward: u = x, v = B, and state is S. In reverse: u = dy, v = C, and state is G. TOTALS: start from zero and leave
    what the part adds and by how much it decays what enters; else start from what enters it, and leave the state before
    every chunk (STATES) and the last one (HAS_FINAL).
    """
    pid = tl.program_id(0).to(tl.int64)  # b, h
    rank = tl.program_id(1)  # parts in the order of the walk
    b, h = pid // H, pid % H
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    u += b * u_sb + (h // SU) * u_sh
    v += b * v_sb + (h // SV) * v_sh
    steps += pid * chunks * Q * 2
    documents += b * chunks * Q

    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    carried = 1.0
    if HAS_ENTERING:
        state = _load(entering + (pid * parts + rank) * P * N, N, p, n, P, N).to(tl.float32)
    first = rank * per_part
    last = tl.minimum(first + per_part, chunks)
    for i in range(first, last):
        c = tl.cast(chunks - 1 - i if REVERSE else i, tl.int64)
        if STATES:
            place = states + ((b * chunks + c) * H + h) * P * N
            _store(place, N, p, n, P, N, state.to(states.dtype.element_ty))
        t = c * Q + q
        u_ = _load(u, u_sl, t, p, L, P)
        v_ = _load(v, v_sl, t, n, L, N)
        step, decay, end = _load_steps(steps + c * Q * 2, Q)
        carry = tl.exp2(end)
        if REVERSE:
            weight = tl.exp2(decay)
        else:
            weight = tl.exp2(end - decay) * step
        if HAS_SEQ:
            document = tl.load(documents + t)
            changes = tl.load(documents + c * Q + Q - 1)
            weight = tl.where(document == (0 if REVERSE else changes), weight, 0.0)
            carry = tl.where(changes == 0, carry, 0.0)
        if BLOCK_P <= BLOCK_N:
            u_ = (u_ * weight[:, None]).to(u_.dtype)
        else:
            v_ = (v_ * weight[:, None]).to(u_.dtype)
        state = tl.dot(tl.trans(u_), v_, state * carry, input_precision=PRECISION)
        carried *= carry
    if TOTALS:
        _store(totals + (pid * parts + rank) * P * N, N, p, n, P, N, state)
        tl.store(total_decays + pid * parts + rank, carried)
    elif HAS_FINAL:
        if rank == parts - 1:
            _store(final + pid * P * N, N, p, n, P, N, state)


@triton.jit
def _segments_kernel(
    totals, total_decays, initial, entering, segments,
    SLOTS: tl.constexpr, SIZE: tl.constexpr, HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The states entering the segments of a walk, from what each of the SLOTS parts of every segment adds."""
    pid = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + pid * SIZE + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(entering + pid * segments * SIZE + at, state, mask=ok)
    for segment in range(1, segments):
        for slot in tl.static_range(SLOTS):
            part = (pid * segments + segment - 1) * SLOTS + slot
            state = state * tl.load(total_decays + part) + tl.load(totals + part * SIZE + at, mask=ok, other=0.0)
        tl.store(entering + (pid * segments + segment) * SIZE + at, state, mask=ok)


@triton.jit
def _forward_kernel(
    x, B, C, D, steps, documents, entering, out, final, states,
    x_sb, x_sl, x_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh, L, H, chunks, parts, per_part,
    SX: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    HAS_D: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_ENTERING: tl.constexpr, HAS_FINAL: tl.constexpr,
    STATES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one segment: walk its chunks with the state in registers."""
    pid = tl.program_id(0).to(tl.int64)  # b, h
    rank = tl.program_id(1)
    b, h = pid // H, pid % H
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    causal = q[:, None] >= q[None, :]
    x += b * x_sb + (h // SX) * x_sh
    B += b * B_sb + (h // SB) * B_sh
    C += b * C_sb + (h // SC) * C_sh
    out += (b * L * H + h) * P
    steps += pid * chunks * Q * 2
    documents += b * chunks * Q
    if HAS_D:
        skip = tl.load(D + h).to(tl.float32)

    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_ENTERING:
        state = _load(entering + (pid * parts + rank) * P * N, N, p, n, P, N).to(tl.float32)
    first = rank * per_part
    last = tl.minimum(first + per_part, chunks)
    for i in range(first, last):
        c = tl.cast(i, tl.int64)
        t = c * Q + q
        x_ = _load(x, x_sl, t, p, L, P)
        B_ = _load(B, B_sl, t, n, L, N)
        C_ = _load(C, C_sl, t, n, L, N)
        step, decay, end = _load_steps(steps + c * Q * 2, Q)
        visible = causal
        from_start = tl.exp2(decay)
        to_end = tl.exp2(end - decay) * step
        carry = tl.exp2(end)
        if HAS_SEQ:
            document = tl.load(documents + t)
            changes = tl.load(documents + c * Q + Q - 1)
            visible = visible & (document[:, None] == document[None, :])
            from_start = tl.where(document == 0, from_start, 0.0)
            to_end = tl.where(document == changes, to_end, 0.0)
            carry = tl.where(changes == 0, carry, 0.0)

        state_ = state.to(x_.dtype)
        if STATES:
            _store(states + ((b * chunks + c) * H + h) * P * N, N, p, n, P, N, state_)
        mix = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
        mix *= tl.exp2(tl.where(visible, decay[:, None] - decay[None, :], -float("inf"))) * step[None, :]
        if HAS_D:
            mix += tl.where(q[:, None] == q[None, :], skip, 0.0)
        y_ = tl.dot(C_, tl.trans(state_), input_precision=PRECISION) * from_start[:, None]
        y_ = tl.dot(mix.to(x_.dtype), x_, y_, input_precision=PRECISION)
        _store(out, H * P, t, p, L, P, y_)
        if BLOCK_P <= BLOCK_N:
            keys = tl.trans((x_ * to_end[:, None]).to(x_.dtype))
            state = tl.dot(keys, B_, state * carry, input_precision=PRECISION)
        else:
            keys = (B_ * to_end[:, None]).to(x_.dtype)
            state = tl.dot(tl.trans(x_), keys, state * carry, input_precision=PRECISION)
    if HAS_FINAL:
        if rank == parts - 1:
            _store(final + pid * P * N, N, p, n, P, N, state)


@triton.jit
def _raw_step_gradient(d_step, dt, dt_bias, h, t_ok, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Through the softplus and the bias of the step sizes; dt points to those of head h."""
    if SOFTPLUS:
        raw = tl.load(dt, mask=t_ok, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(dt_bias + h).to(tl.float32)
        d_step = d_step / (1.0 + tl.exp(-raw))
    return tl.where(t_ok, d_step, 0.0)


@triton.jit
def _output_kernel(
    x, B, C, D, steps, documents, states, out,
    x_sb, x_sl, x_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh, L, H, chunks,
    HEADS: tl.constexpr, SX: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_SEQ: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk, from the states that enter it, for HEADS heads of one B and C (so one score tile)."""
    units = H // HEADS
    b, c, unit = _place(tl.program_id(0), chunks, units)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    left = (L - c * Q).to(tl.int32)  # tokens from here on
    visible = q[:, None] >= q[None, :]
    if HAS_SEQ:
        document = tl.load(documents + (b * chunks + c) * Q + q)
        visible = visible & (document[:, None] == document[None, :])
    B_ = _load(B + b * B_sb + unit * B_sh + c * Q * B_sl, B_sl, q, n, left, N)
    C_ = _load(C + b * C_sb + unit * C_sh + c * Q * C_sl, C_sl, q, n, left, N)
    scores = tl.dot(C_, tl.trans(B_), input_precision=PRECISION)
    for i in range(HEADS):
        h = tl.cast(unit * HEADS + i, tl.int64)
        x_ = _load(x + b * x_sb + (h // SX) * x_sh + c * Q * x_sl, x_sl, q, p, left, P)
        state = _load(states + ((b * chunks + c) * H + h) * P * N, N, p, n, P, N)
        step, decay, _ = _load_steps(steps + ((b * H + h) * chunks + c) * Q * 2, Q)
        from_start = tl.exp2(decay)
        if HAS_SEQ:
            from_start = tl.where(document == 0, from_start, 0.0)
        y_ = tl.dot(C_, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
        mix = scores * tl.exp2(tl.where(visible, decay[:, None] - decay[None, :], -float("inf"))) * step[None, :]
        if HAS_D:
            mix += tl.where(q[:, None] == q[None, :], tl.load(D + h).to(tl.float32), 0.0)
        y_ = tl.dot(mix.to(x_.dtype), x_, y_, input_precision=PRECISION)
        _store(out + (b * L * H + h) * P + c * Q * H * P, H * P, q, p, left, P, y_)


@triton.jit
def _before_and_after(before, after, SCAN: tl.constexpr, Q: tl.constexpr):
    """For every token j of a chunk, the sum of before[s] over s < j and of after[t] over t >= j."""
    if SCAN:
        return tl.cumsum(after, 0, reverse=True) + tl.cumsum(before, 0) - before
    # No barriers, but more registers: faster outside of loops.
    q = tl.arange(0, Q)
    return tl.sum(tl.where(q[:, None] <= q[None, :], after[None, :], before[None, :]), 1)


@triton.jit
def _entering_kernel(
    C, dy, steps, documents, states, adjoints, dC, d_decays, C_sb, C_sl, C_sh, dy_sb, dy_sl, dy_sh, L, H, chunks,
    HEADS: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_SEQ: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the state entering a chunk gives dC and the summed log decays."""
    units = H // HEADS
    b, c, unit = _place(tl.program_id(0), chunks, units)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    left = (L - c * Q).to(tl.int32)  # tokens from here on
    C_ = _load(C + b * C_sb + unit * C_sh + c * Q * C_sl, C_sl, q, n, left, N)
    dC_ = tl.zeros((Q, BLOCK_N), tl.float32)
    for i in tl.range(0, HEADS, num_stages=STAGES):  # named here: for all loads, not only those of products
        h = tl.cast(unit * HEADS + i, tl.int64)
        dy_ = _load(dy + b * dy_sb + h * dy_sh + c * Q * dy_sl, dy_sl, q, p, left, P)
        place = ((b * chunks + c) * H + h) * P * N
        state = _load(states + place, N, p, n, P, N)
        adjoint = _load(adjoints + place, N, p, n, P, N)
        passed = tl.sum(tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 1), 0)
        row = ((b * H + h) * chunks + c) * Q
        _, decay, end = _load_steps(steps + row * 2, Q)
        from_start = tl.exp2(decay)
        passed *= tl.exp2(end)
        if HAS_SEQ:
            from_start = tl.where(tl.load(documents + (b * chunks + c) * Q + q) == 0, from_start, 0.0)
            passed = tl.where(tl.load(documents + (b * chunks + c + 1) * Q - 1) == 0, passed, 0.0)
        y = tl.dot(C_, tl.trans(state), input_precision=PRECISION)
        # What leaves again has the decay of the whole chunk, the sum up to its last token.
        tl.store(d_decays + row + q, tl.sum(y * dy_, 1) * from_start + tl.where(q == Q - 1, passed, 0.0))
        dC_ = tl.dot((dy_ * from_start[:, None]).to(dy_.dtype), state, dC_, input_precision=PRECISION)
    _store(dC + (b * L * units + unit) * N + c * Q * units * N, units * N, q, n, left, N, dC_)


@triton.jit
def _leaving_kernel(
    x, B, steps, documents, adjoints, dx, dB, d_steps, x_sb, x_sl, x_sh, B_sb, B_sl, B_sh, L, H, chunks,
    HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_SEQ: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the state leaving a chunk gives dx, dB and (pairs, d_steps) steps and log decays; HEADS heads of one B."""
    units = H // HEADS
    b, c, unit = _place(tl.program_id(0), chunks, units)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    left = (L - c * Q).to(tl.int32)  # tokens from here on
    B_ = _load(B + b * B_sb + unit * B_sh + c * Q * B_sl, B_sl, q, n, left, N)
    dB_ = tl.zeros((Q, BLOCK_N), tl.float32)
    for i in range(HEADS):
        h = tl.cast(unit * HEADS + i, tl.int64)
        place = ((b * chunks + c) * H + h) * P * N
        adjoint = _load(adjoints + place, N, p, n, P, N)
        x_ = _load(x + b * x_sb + h * x_sh + c * Q * x_sl, x_sl, q, p, left, P)
        row = ((b * H + h) * chunks + c) * Q
        step, decay, end = _load_steps(steps + row * 2, Q)
        to_end = tl.exp2(end - decay)
        if HAS_SEQ:
            changes = tl.load(documents + (b * chunks + c + 1) * Q - 1)
            to_end = tl.where(tl.load(documents + (b * chunks + c) * Q + q) == changes, to_end, 0.0)
        dx_ = tl.dot(B_, tl.trans(adjoint), input_precision=PRECISION) * to_end[:, None]
        d_step = tl.sum(dx_ * x_, 1)
        _store(dx + (b * L * H + h) * P + c * Q * H * P, H * P, q, p, left, P, dx_ * step[:, None])
        dB_ = tl.dot((x_ * (to_end * step)[:, None]).to(x_.dtype), adjoint, dB_, input_precision=PRECISION)
        # The log decay of a token acts on the keys before it, on their way to the end.
        keys = d_step * step
        d_log = tl.cumsum(keys, 0) - keys
        tl.store(d_steps + (row + q[:, None]) * 2 + tl.arange(0, 2)[None, :], tl.join(d_step, d_log))
    _store(dB + (b * L * units + unit) * N + c * Q * units * N, units * N, q, n, left, N, dB_)


@triton.jit
def _within_kernel(
    x, B, C, D, dy, dt, dt_bias, A, steps, documents, d_steps, d_decays, dx, dB, dC, ddt, d_heads,
    x_sb, x_sl, x_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh, dy_sb, dy_sl, dy_sh, dt_sb, dt_sl, dt_sh,
    L, H, chunks, d_plane,
    HEADS: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what passes inside a chunk to what the two kernels before left, for HEADS heads of one B and C."""
    units = H // HEADS
    b, c, unit = _place(tl.program_id(0), chunks, units)
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    left = (L - c * Q).to(tl.int32)  # tokens from here on
    visible = q[:, None] <= q[None, :]
    dtype = x.dtype.element_ty
    if HAS_SEQ:
        document = tl.load(documents + (b * chunks + c) * Q + q)
        visible = visible & (document[:, None] == document[None, :])
    B_ = _load(B + b * B_sb + unit * B_sh + c * Q * B_sl, B_sl, q, n, left, N)
    C_ = _load(C + b * C_sb + unit * C_sh + c * Q * C_sl, C_sl, q, n, left, N)
    scores = tl.dot(B_, tl.trans(C_), input_precision=PRECISION)
    own_scores = tl.sum(tl.where(q[:, None] == q[None, :], scores, 0.0), 1)
    d_scores = tl.zeros((Q, Q), tl.float32)
    for i in tl.range(0, HEADS, num_stages=STAGES):
        h = tl.cast(unit * HEADS + i, tl.int64)
        x_ = _load(x + b * x_sb + h * x_sh + c * Q * x_sl, x_sl, q, p, left, P)
        dy_ = _load(dy + b * dy_sb + h * dy_sh + c * Q * dy_sl, dy_sl, q, p, left, P)
        dx_at = dx + (b * L * H + h) * P
        dx_ = _load(dx_at + c * Q * H * P, H * P, q, p, left, P).to(tl.float32)
        row = ((b * H + h) * chunks + c) * Q
        step, decay, _ = _load_steps(steps + row * 2, Q)
        d_step_across, d_log_across, _ = _load_steps(d_steps + row * 2, Q)
        skip = 0.0
        if HAS_D:
            skip = tl.load(D + h).to(tl.float32)
        mix, d_mix, d_step, d_decay, d_skip = _pairs(
            x_, dy_, scores, own_scores, step, decay, visible, skip, Q, PRECISION
        )
        d_scores += d_mix
        dx_ = tl.dot(mix, dy_, dx_, input_precision=PRECISION)
        _store(dx_at + c * Q * H * P, H * P, q, p, left, P, dx_)
        d_log = tl.cumsum(d_decay + tl.load(d_decays + row + q), 0, reverse=True) + d_log_across
        d_step += d_step_across + tl.load(A + h).to(tl.float32) * d_log
        raw = dt + b * dt_sb + c * Q * dt_sl + h * dt_sh + q * dt_sl
        d_step = _raw_step_gradient(d_step, raw, dt_bias, h, q < left, SOFTPLUS, HAS_BIAS)
        tl.store(ddt + (b * L + c * Q) * H + h + q * H, d_step.to(ddt.dtype.element_ty), mask=q < left)
        # Sums over a chunk would cost barriers here.
        tl.store(d_heads + row + q, step * d_log)
        tl.store(d_heads + d_plane + row + q, d_step)
        if HAS_D:
            tl.store(d_heads + 2 * d_plane + row + q, d_skip)
    place = (b * L * units + unit) * N
    d_scores_ = d_scores.to(dtype)
    dB_ = _load(dB + place + c * Q * units * N, units * N, q, n, left, N).to(tl.float32)
    dB_ = tl.dot(d_scores_, C_, dB_, input_precision=PRECISION)
    _store(dB + place + c * Q * units * N, units * N, q, n, left, N, dB_)
    dC_ = _load(dC + place + c * Q * units * N, units * N, q, n, left, N).to(tl.float32)
    dC_ = tl.dot(tl.trans(d_scores_), B_, dC_, input_precision=PRECISION)
    _store(dC + place + c * Q * units * N, units * N, q, n, left, N, dC_)


@triton.jit
def _pairs(x, dy, scores, own_scores, step, decay, visible, skip, Q: tl.constexpr, PRECISION: tl.constexpr):
    """What passes between pairs of tokens of a chunk, in tiles [s, t]; scores[s, t] = B_s.C_t, own_scores its diagonal.

    Returns the mixing matrix, with the skip weight on its diagonal, in x's dtype; the gradients of the scores, of the
    step sizes (direct), of the summed log decays, and, token by token, of the skip weight.
    """
    itself = tl.arange(0, Q)[:, None] == tl.arange(0, Q)[None, :]
    d_mix = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
    d_skip = tl.sum(tl.where(itself, d_mix, 0.0), 1)
    between = tl.exp2(tl.where(visible, decay[None, :] - decay[:, None], -float("inf")))
    mix = (scores * (between * step[:, None]) + tl.where(itself, skip, 0.0)).to(x.dtype)
    d_mix *= between
    # A token's own pair does not depend on any decay: left out of these sums, its rounding stays out of them too.
    each = tl.where(itself, 0.0, d_mix * scores)
    d_step = tl.sum(each, 1)
    d_decay = tl.sum(each * step[:, None], 0) - d_step * step
    return mix, d_mix * step[:, None], d_step + d_skip * own_scores, d_decay, d_skip


@triton.jit
def _backward_kernel(
    x, B, C, D, dy, dt, dt_bias, A, steps, documents, states, adjoints, dx, dB, dC, ddt, d_heads,
    x_sb, x_sl, x_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh, dy_sb, dy_sl, dy_sh, dt_sb, dt_sl, dt_sh,
    L, H, chunks, d_plane,
    SX: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_D: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk, for HEADS neighbouring heads, among which every shared operand is shared.

    Tiles over pairs of tokens are transposed, [s, t], so that most products take them as they come out of the last one.
    The order of the work keeps few tiles alive at a time; what is left of 255 registers a thread is little.
    """
    units = H // HEADS
    b, c, unit = _place(tl.program_id(0), chunks, units)
    q = tl.arange(0, Q)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dtype = x.dtype.element_ty
    if SX > 1:
        dx_sum = tl.zeros((Q, BLOCK_P), tl.float32)
    if SB > 1:
        dB_sum = tl.zeros((Q, BLOCK_N), tl.float32)
    if SC > 1:
        dC_sum = tl.zeros((Q, BLOCK_N), tl.float32)

    for i in tl.range(0, HEADS, num_stages=STAGES):
        # What depends on the chunk is found here, not before the loop: it would take registers all along.
        h = tl.cast(unit * HEADS + i, tl.int64)
        t = c * Q + q
        t_ok = t < L
        visible = q[:, None] <= q[None, :]
        if HAS_SEQ:
            document = tl.load(documents + b * chunks * Q + t)
            changes = tl.load(documents + b * chunks * Q + c * Q + Q - 1)
            visible = visible & (document[:, None] == document[None, :])
        x_ = _load(x + b * x_sb + (h // SX) * x_sh, x_sl, t, p, L, P)
        dy_ = _load(dy + b * dy_sb + h * dy_sh, dy_sl, t, p, L, P)
        place = ((b * chunks + c) * H + h) * P * N
        state = _load(states + place, N, p, n, P, N)
        adjoint = _load(adjoints + place, N, p, n, P, N)
        passed = tl.sum(tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 1), 0)
        B_ = _load(B + b * B_sb + (h // SB) * B_sh, B_sl, t, n, L, N)
        C_ = _load(C + b * C_sb + (h // SC) * C_sh, C_sl, t, n, L, N)
        row = ((b * H + h) * chunks + c) * Q
        step, decay, end = _load_steps(steps + row * 2, Q)
        from_start = tl.exp2(decay)
        to_end = tl.exp2(end - decay)
        passed *= tl.exp2(end)
        if HAS_SEQ:
            from_start = tl.where(document == 0, from_start, 0.0)
            to_end = tl.where(document == changes, to_end, 0.0)
            passed = tl.where(changes == 0, passed, 0.0)

        # Through the state that leaves the chunk, and the one that enters it.
        dx_ = tl.dot(B_, tl.trans(adjoint), input_precision=PRECISION) * to_end[:, None]
        d_step_out = tl.sum(dx_ * x_, 1)
        dx_ *= step[:, None]
        dB_ = tl.dot(x_, adjoint, input_precision=PRECISION) * (to_end * step)[:, None]
        dC_ = tl.dot(dy_, state, input_precision=PRECISION) * from_start[:, None]
        d_decay_in = tl.sum(dC_ * C_, 1)
        if SX > 1:
            dx_ += dx_sum
        if SB > 1:
            dB_ += dB_sum
        if SC > 1:
            dC_ += dC_sum

        # Pairs of tokens inside the chunk.
        scores = tl.dot(B_, tl.trans(C_), input_precision=PRECISION)
        skip = 0.0
        if HAS_D:
            skip = tl.load(D + h).to(tl.float32)
        own_scores = tl.sum(tl.where(q[:, None] == q[None, :], scores, 0.0), 1)
        mix, d_mix, d_step, d_decay, d_skip = _pairs(
            x_, dy_, scores, own_scores, step, decay, visible, skip, Q, PRECISION
        )
        dx_ = tl.dot(mix, dy_, dx_, input_precision=PRECISION)
        if SX == 1 or i % SX == SX - 1:
            heads = H // SX
            _store(dx + (b * L * heads + h // SX) * P, heads * P, t, p, L, P, dx_)
        if SX > 1:
            dx_sum = tl.where(i % SX == SX - 1, 0.0, dx_)
        d_mix_ = d_mix.to(dtype)
        dB_ = tl.dot(d_mix_, C_, dB_, input_precision=PRECISION)
        if SB == 1 or i % SB == SB - 1:
            heads = H // SB
            _store(dB + (b * L * heads + h // SB) * N, heads * N, t, n, L, N, dB_)
        if SB > 1:
            dB_sum = tl.where(i % SB == SB - 1, 0.0, dB_)
        dC_ = tl.dot(tl.trans(d_mix_), B_, dC_, input_precision=PRECISION)
        if SC == 1 or i % SC == SC - 1:
            heads = H // SC
            _store(dC + (b * L * heads + h // SC) * N, heads * N, t, n, L, N, dC_)
        if SC > 1:
            dC_sum = tl.where(i % SC == SC - 1, 0.0, dC_)

        # The log decay of token j acts on what passes it: pairs s < j <= t, the state entering before it, the keys
        # before it on their way to the end, and the state that passes the whole chunk.
        d_log = _before_and_after(d_step_out * step, d_decay + d_decay_in, HEADS > 1, Q) + passed
        d_step += d_step_out + tl.load(A + h).to(tl.float32) * d_log
        raw = dt + b * dt_sb + t * dt_sl + h * dt_sh
        d_step = _raw_step_gradient(d_step, raw, dt_bias, h, t_ok, SOFTPLUS, HAS_BIAS)
        tl.store(ddt + (b * L + t) * H + h, d_step.to(ddt.dtype.element_ty), mask=t_ok)
        # Sums over a chunk would cost barriers here.
        tl.store(d_heads + row + q, step * d_log)
        tl.store(d_heads + d_plane + row + q, d_step)
        if HAS_D:
            tl.store(d_heads + 2 * d_plane + row + q, d_skip)


@triton.jit
def _heads_kernel(d_heads, out, B, H, L, d_plane, BLOCK: tl.constexpr):
    """Sum d_heads (3, B, H, L) over B and L."""
    plane, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float32)
    for b in range(B):
        row = d_heads + plane * d_plane + (tl.cast(b, tl.int64) * H + h) * L
        for start in range(0, L, BLOCK):
            t = start + tl.arange(0, BLOCK)
            total += tl.load(row + t, mask=t < L, other=0.0)
    tl.store(out + plane * H + h, tl.sum(total, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class _Inputs(NamedTuple):
    """What both passes read: the first arguments of ssd_scan, and of ssd_scan_backward those after the gradients."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None

    def strides(self):
        """Those of x, B and C."""
        return *self.x.stride()[:3], *self.B.stride()[:3], *self.C.stride()[:3]


class _Scan:
    """What all launches of one scan share. Its step sizes and decays `steps` (B, H, chunks * Q, 2) and the numbers of
    its `documents` (B, chunks * Q; empty without seq_idx) are what find_steps or an earlier pass found."""

    def __init__(self, run, inputs, dt_softplus, chunk_size, steps=None, documents=None):
        self.run, self.new = run, run.new
        self.inputs, self.dt_softplus = inputs, dt_softplus
        self.steps, self.documents = steps, documents
        x, dt, _, B, C, *_ = inputs
        self.batch, self.length, self.heads = dt.shape
        self.P, self.N = x.shape[-1], B.shape[-1]
        self.shares = {"SX": self.heads // x.shape[2], "SB": self.heads // B.shape[2], "SC": self.heads // C.shape[2]}
        self.Q = chunk_length(self.N, x.dtype, chunk_size)
        self.chunks = -(-self.length // self.Q)
        self.together = math.lcm(*self.shares.values())  # neighbouring heads among which every operand is shared whole
        self.one_score_tile = self.shares["SB"] == self.shares["SC"] == self.together > 1
        self.per_chunk = (self.batch * self.chunks * (self.heads // self.together),)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        self.common = {
            "P": self.P, "N": self.N, "Q": self.Q, "PRECISION": "tf32" if tf32 else "tf32x3",
            "BLOCK_P": max(16, power_of_2(self.P)), "BLOCK_N": max(16, power_of_2(self.N)),
        }  # fmt: skip
        rows = self.batch * self.heads
        per_segment = -(-self.chunks // max(1, 2 * sm_count(x.device) // rows))
        self.per_segment = -(-per_segment // SLOTS) * SLOTS
        self.segments = -(-self.chunks // self.per_segment)

    def sizes(self):
        """L, H and the number of chunks, as most kernels take them."""
        return self.length, self.heads, self.chunks

    def find_steps(self, seq_idx):
        """Launch _steps_kernel, for `steps` and `documents`."""
        dt, A, dt_bias = self.inputs.dt, self.inputs.A, self.inputs.dt_bias
        self.steps = self.new(self.batch, self.heads, self.chunks * self.Q, 2)
        shape = (0,) if seq_idx is None else (self.batch, self.chunks * self.Q)
        self.documents = self.new(*shape, dtype=torch.int32)
        block = min(16, power_of_2(self.heads))
        self.run(
            _steps_kernel, (self.batch * self.chunks, -(-self.heads // block)),
            dt, dt_bias, A, seq_idx, self.steps, self.documents,
            *dt.stride(), *((0, 0) if seq_idx is None else seq_idx.stride()), *self.sizes(),
            SOFTPLUS=self.dt_softplus, HAS_BIAS=dt_bias is not None, HAS_SEQ=seq_idx is not None, Q=self.Q,
            BLOCK_H=block, num_warps=4,
        )  # fmt: skip

    def entering(self, u, v, initial, *, reverse):
        """The states that enter the segments of a walk, (B, H, segments, P, N), or None for zeros."""
        if self.segments == 1:
            return initial
        rows, size = self.batch * self.heads, self.P * self.N
        slots = self.segments * SLOTS
        totals = self.new(rows, slots, size), self.new(rows, slots)
        self.walk(u, v, reverse=reverse, totals=totals)
        entering = self.new(rows, self.segments, size)
        self.run(
            _segments_kernel, (rows, -(-size // 1024)),
            *totals, initial, entering, self.segments,
            SLOTS=SLOTS, SIZE=size, HAS_INITIAL=initial is not None, BLOCK=1024,
        )  # fmt: skip
        return entering

    def walk(self, u, v, *, reverse, entering=None, final=None, states=None, totals=None):
        """Launch _state_kernel: for totals, or else for states and the final one."""
        parts, per_part, programs = self.segments, self.per_segment, self.segments
        if totals is not None:
            parts, per_part, programs = parts * SLOTS, per_part // SLOTS, (parts - 1) * SLOTS
        self.run(
            _state_kernel, (self.batch * self.heads, programs),
            u, v, self.steps, self.documents, entering, final, states, *(totals or (None, None)),
            *u.stride()[:3], *v.stride()[:3], *self.sizes(), parts, per_part,
            SU=self.heads // u.shape[2], SV=self.heads // v.shape[2], REVERSE=reverse, TOTALS=totals is not None,
            HAS_ENTERING=entering is not None, HAS_FINAL=final is not None, STATES=states is not None,
            HAS_SEQ=self.documents.numel() > 0, **self.common, **config("state", self.N),
        )  # fmt: skip


def _forward(run, *args):
    *inputs, initial_state, seq_idx, dt_softplus, return_final_state, chunk_size, training = args
    x, dt, _, B, C, D, _ = inputs = _Inputs(*inputs)
    scan = _Scan(run, inputs, dt_softplus, chunk_size)
    scan.find_steps(seq_idx)
    entering = scan.entering(x, B, initial_state, reverse=False)
    steps, documents = scan.steps, scan.documents

    batch, heads, P, N = scan.batch, scan.heads, scan.P, scan.N
    out = run.new(*dt.shape, P, dtype=x.dtype)
    states = run.new(*(batch, scan.chunks, heads, P, N) if training else (0,), dtype=x.dtype)
    final = run.new(*(batch, heads, P, N) if return_final_state else (0,))
    options = {"HAS_D": D is not None, "HAS_SEQ": seq_idx is not None, **scan.common}
    if training and scan.one_score_tile:
        last = final if return_final_state else None
        scan.walk(x, B, reverse=False, entering=entering, final=last, states=states)
        run(
            _output_kernel, scan.per_chunk,
            x, B, C, D, steps, documents, states, out, *inputs.strides(), *scan.sizes(),
            HEADS=scan.together, SX=scan.shares["SX"], **options, **config("output", N),
        )  # fmt: skip
    else:
        run(
            _forward_kernel, (batch * heads, scan.segments),
            x, B, C, D, steps, documents, entering, out, final, states, *inputs.strides(),
            *scan.sizes(), scan.segments, scan.per_segment, HAS_ENTERING=entering is not None,
            HAS_FINAL=return_final_state, STATES=training, **scan.shares, **options, **config("forward", N),
        )  # fmt: skip
    if training and run.dry:
        initial_grad = initial_state is not None and initial_state.requires_grad
        _gradients(run, out, None, *inputs, states, steps, documents, dt_softplus, initial_grad, chunk_size)
    if not training:
        steps, documents = run.new(0), run.new(0, dtype=torch.int32)
    return out, final, states, steps, documents


def _gradients(run, dy, d_final, *args):
    *inputs, states, steps, documents, dt_softplus, initial_grad, chunk_size = args
    x, dt, A, B, C, D, dt_bias = inputs = _Inputs(*inputs)
    scan = _Scan(run, inputs, dt_softplus, chunk_size, steps, documents)
    entering = scan.entering(dy, C, d_final, reverse=True)
    batch, heads, N = scan.batch, scan.heads, scan.N
    adjoints = run.like(states)
    d_initial = run.new(batch, heads, scan.P, N) if initial_grad else None
    scan.walk(dy, C, reverse=True, entering=entering, final=d_initial, states=adjoints)

    dx, dB, dC, ddt = map(run.like, (x, B, C, dt))
    d_heads = run.new(3, *steps.shape[:-1])  # of A, dt_bias and D, token by token
    d_plane = d_heads.stride(0)
    strides = *inputs.strides(), *dy.stride()[:3], *dt.stride()
    options = {"HEADS": scan.together, "HAS_SEQ": documents.numel() > 0, **scan.common}
    through = {"HAS_D": D is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus}
    if scan.one_score_tile and scan.shares["SX"] == 1:
        d_steps, d_decays = run.like(steps), run.new(*steps.shape[:-1])
        stages = {"STAGES": loop_stages(N)}
        run(
            _entering_kernel, scan.per_chunk,
            C, dy, steps, documents, states, adjoints, dC, d_decays, *C.stride()[:3], *dy.stride()[:3], *scan.sizes(),
            **options, **stages, **config("entering", N),
        )  # fmt: skip
        run(
            _leaving_kernel, scan.per_chunk,
            x, B, steps, documents, adjoints, dx, dB, d_steps, *x.stride()[:3], *B.stride()[:3], *scan.sizes(),
            **options, **config("leaving", N),
        )  # fmt: skip
        run(
            _within_kernel, scan.per_chunk,
            x, B, C, D, dy, dt, dt_bias, A, steps, documents, d_steps, d_decays, dx, dB, dC, ddt, d_heads,
            *strides, *scan.sizes(), d_plane, **options, **through, **stages, **config("within", N),
        )  # fmt: skip
    else:
        run(
            _backward_kernel, scan.per_chunk,
            x, B, C, D, dy, dt, dt_bias, A, steps, documents, states, adjoints, dx, dB, dC, ddt, d_heads,
            *strides, *scan.sizes(), d_plane, **scan.shares, **options, **through, STAGES=2,
            **config("backward", N),
        )  # fmt: skip
    sums = run.new(3, heads)
    run(_heads_kernel, (3, heads), d_heads, sums, batch, heads, steps.shape[2], d_plane, BLOCK=4096, num_warps=8)
    return dx, ddt, dB, dC, run.new(0) if d_initial is None else d_initial, sums


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def ssd_scan_backward(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    states: Tensor,
    steps: Tensor,
    documents: Tensor,
    dt_softplus: bool,
    initial_grad: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C, the initial state, and (3, H) float32 those of A, dt_bias and D."""
    return launched(
        _gradients, inner_contiguous(dy), d_final, x, dt, A, B, C, D, dt_bias, states, steps, documents,
        dt_softplus, initial_grad, chunk_size,
    )  # fmt: skip


def _fake_gradients(dy, d_final, *args):
    *inputs, _, _, _, _, initial_grad, _ = args
    x, dt, _, B, C, *_ = inputs
    batch, _, heads = dt.shape
    f32 = {"dtype": torch.float32}
    d_initial = x.new_empty(batch, heads, x.shape[-1], B.shape[-1], **f32) if initial_grad else x.new_empty(0, **f32)
    grads = (t.new_empty(t.shape) for t in (x, dt, B, C))
    return *grads, d_initial, x.new_empty(3, heads, **f32)


ssd_scan_backward = CustomOp(ssd_scan_backward, _fake_gradients, **once("ssd_scan", remedy="; backend='torch' can"))


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    return_final_state: bool,
    chunk_size: int | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scan; see transpoint.kernels.ssd. x, B and C of one dtype, and contiguous in their last dimension.

    Returns:
        out (B, L, H, P) and the final state (B, H, P, N), empty unless asked for; and for the backward pass, empty
        unless training: the states entering the chunks (B, chunks, H, P, N), the step sizes and decays
        (B, H, chunks * Q, 2), and the documents (B, chunks * Q).
    """
    return launched(
        _forward, x, dt, A, B, C, D, dt_bias, initial_state, seq_idx, dt_softplus, return_final_state, chunk_size,
        training,
    )  # fmt: skip


def _fake(*args):
    *inputs, _, seq_idx, _, return_final_state, chunk_size, training = args
    x, dt, _, B, *_ = inputs
    batch, length, heads = dt.shape
    P, N, Q = x.shape[-1], B.shape[-1], chunk_length(B.shape[-1], x.dtype, chunk_size)
    chunks = (length + Q - 1) // Q
    f32 = {"dtype": torch.float32}
    final = x.new_empty((batch, heads, P, N) if return_final_state else (0,), **f32)
    states = x.new_empty((batch, chunks, heads, P, N) if training else (0,))
    steps = x.new_empty((batch, heads, chunks * Q, 2) if training else (0,), **f32)
    documents = x.new_empty((batch, chunks * Q) if training and seq_idx is not None else (0,), dtype=torch.int32)
    return x.new_empty(batch, length, heads, P), final, states, steps, documents


def _save(ctx, inputs, output):
    *inputs, initial_state, _, ctx.dt_softplus, _, ctx.chunk_size, _ = inputs
    ctx.set_materialize_grads(False)  # else zeros are made for every output that is only for the backward pass
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, dy, d_final, *_):
    x, dt, A, _, _, D, dt_bias, *_ = ctx.saved_tensors
    initial_grad = ctx.initial_dtype is not None and ctx.needs_input_grad[7]
    if dy is None:
        dy = x.new_zeros(*dt.shape, x.shape[-1])
    dx, ddt, dB, dC, d_initial, d_heads = ssd_scan_backward(
        dy, None if d_final is None else d_final.contiguous(), *ctx.saved_tensors,
        ctx.dt_softplus, initial_grad, ctx.chunk_size,
    )  # fmt: skip
    dA, d_bias, dD = d_heads.unbind(0)
    return (
        dx, ddt, dA.to(A.dtype), dB, dC,
        None if D is None else dD.to(D.dtype),
        None if dt_bias is None else d_bias.to(dt_bias.dtype),
        d_initial.to(ctx.initial_dtype) if initial_grad else None,
        None, None, None, None, None,
    )  # fmt: skip


ssd_scan = CustomOp(ssd_scan, _fake, save=_save, gradients=_backward)
