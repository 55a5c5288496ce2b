"""Triton kernels of the gated delta rule, forward and backward, registered as torch custom ops.

With chunks of Q tokens (rows), b_t the sum of the log decays from the start of t's chunk to t, S the state that enters
a chunk, G the gradient of the state that leaves it, and W_ts = exp(b_t - b_s) for s <= t, else 0 (Yang, Kautz and
Hatamizadeh 2024, arXiv 2412.06464, section 3.3, and Yang et al. 2024, arXiv 2406.06484, section 3; differentiated by
hand):

    A = beta (k k^T * W) below the diagonal             T = (I + A)^-1
    r = beta (v - exp(b) k S^T)                         u = T r  (what the tokens write under their keys)
    M = q k^T * W                                       y = M u + exp(b) q S^T
    S' = exp(b_Q) S + u^T (exp(b_Q - b) k)

    du = M^T dy + exp(b_Q - b) k G^T                    dr = T^T du            dA = -dr u^T, below the diagonal
    G' = exp(b_Q) G + dy^T (exp(b) q) - dr^T (beta exp(b) k)

The paper splits u into T (beta v) and what T takes from S, before it walks over the chunks. Here the walk multiplies by
T: what is held under a key is subtracted from v in float32, before anything is rounded, and neither half is stored.

    _system_kernel      T of every chunk, and decays, for all that follow
    _walk_kernel        the walk over the chunks that leaves S and u of each
    _output_kernel      y of a chunk
    _values_kernel      M^T dy of a chunk
    _walk_back_kernel   the walk back that leaves G and dr of each chunk
    _gradient_kernel    all gradients of a chunk

Rows of a state (P) do not interact: walks take them in blocks, in programs of their own. Gradients of heads that share
q, k or v are found for each, and then summed. Exponents are in base 2, and differences are taken before the
exponential: they are <= 0, so nothing overflows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import inner_contiguous, power_of_2, sm_count
from .custom_op import CustomOp, once
from .launch import launched
from .ssd_triton import LOG2E, _before_and_after, _load, _load_steps, _place, _store

# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters


def chunk_length(chunk_size: int | None) -> int:
    """Tokens per chunk: 16 or 32, at most chunk_size if that is given.

    Products of 64 tokens of 16 bits are wgmma's. With blocks of 16 or 32 rows of a state the walks that Triton 3.6 made
    of these for an H200 were wrong by factors, or read where nothing is; with 64 rows they were right.
    """
    return 16 if chunk_size is not None and chunk_size < 32 else 32


def block_size(P: int, N: int, dtype: torch.dtype) -> int:
    """The most rows of a state that a program takes: registers hold a state of 8192 numbers, or 4096 in float32."""
    return max(16, min(power_of_2(P), 64 if N <= 128 and dtype != torch.float32 else 32))


def config(N: int, tile: int = 0) -> dict:
    """Warps and pipeline stages of a kernel whose largest tile that stays in registers has so many numbers.

    Chosen for few register spills on sm_90, as ptxas tells them; not timed.
    """
    warps = 8 if tile > 4096 else 4
    # Triton 3.6 was seen to let loads overwrite tiles that products still read, with N = 256 (see ssd_triton).
    return {"num_warps": warps, "num_stages": 2 if N <= 128 else 1}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _system_kernel(
    k, g, beta, seq_idx, systems, steps, documents,
    k_sb, k_sl, k_sh, g_sb, g_sl, g_sh, beta_sb, beta_sl, beta_sh, seq_sb, seq_sl, L, H, chunks,
    SK: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, LEVELS: tl.constexpr, HAS_SEQ: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T (B, H, chunks * Q, Q); pairs (B, H, chunks * Q, 2) of beta and summed log2 decay; changes of document."""
    b, c, h = _place(tl.program_id(0), chunks, H)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    t = c * Q + q
    inside = t < L  # tokens past the end write nothing and decay nothing
    log = tl.load(g + b * g_sb + t * g_sl + h * g_sh, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(beta + b * beta_sb + t * beta_sl + h * beta_sh, mask=inside, other=0.0).to(tl.float32)
    decay = tl.cumsum(log * LOG2E, 0)
    row = ((b * H + h) * chunks + c) * Q
    tl.store(steps + (row + q) * 2, rate)
    tl.store(steps + (row + q) * 2 + 1, decay)
    below = q[:, None] > q[None, :]
    if HAS_SEQ:
        changed = inside & (t > 0)
        here = tl.load(seq_idx + b * seq_sb + t * seq_sl, mask=changed, other=0)
        before = tl.load(seq_idx + b * seq_sb + (t - 1) * seq_sl, mask=changed, other=0)
        document = tl.cumsum((here != before).to(tl.int32), 0)
        below = below & (document[:, None] == document[None, :])
        if h == 0:
            tl.store(documents + b * chunks * Q + t, document)
    k_ = _load(k + b * k_sb + (h // SK) * k_sh, k_sl, t, n, L, N)
    A = tl.dot(k_, tl.trans(k_), input_precision=PRECISION) * rate[:, None]
    A *= tl.exp2(tl.where(below, decay[:, None] - decay[None, :], -float("inf")))
    # The inverse, of blocks on the diagonal twice as large each time: [[X, 0], [C, Y]]^-1 = [[X', 0], [-Y' C X', Y']].
    # A series in powers of A would be shorter, but its terms are huge where keys repeat, and all but cancel.
    T = tl.where(q[:, None] == q[None, :], 1.0, 0.0) - tl.where((q[:, None] ^ q[None, :]) == 1, A, 0.0)
    for level in range(1, LEVELS):
        corner = tl.where(((q[:, None] >> level) ^ (q[None, :] >> level)) == 1, A, 0.0)
        T -= tl.dot(T, tl.dot(corner, T, input_precision="tf32x3"), input_precision="tf32x3")
    _store(systems + row * Q, Q, q, q, Q, Q, T)


@triton.jit
def _load_decays(steps, documents, Q: tl.constexpr, HAS_SEQ: tl.constexpr):
    """beta and summed decays of a chunk; and the factors from its start, to its end, and through it."""
    beta, decay, end = _load_steps(steps, Q)
    from_start, to_end, through = tl.exp2(decay), tl.exp2(end - decay), tl.exp2(end)
    if HAS_SEQ:
        document = tl.load(documents + tl.arange(0, Q))
        changes = tl.load(documents + Q - 1)
        from_start = tl.where(document == 0, from_start, 0.0)
        to_end = tl.where(document == changes, to_end, 0.0)
        through = tl.where(changes == 0, through, 0.0)
    return beta, decay, from_start, to_end, through


@triton.jit
def _within(decay, documents, Q: tl.constexpr, HAS_SEQ: tl.constexpr):
    """W of a chunk."""
    q = tl.arange(0, Q)
    visible = q[:, None] >= q[None, :]
    if HAS_SEQ:
        document = tl.load(documents + q)
        visible = visible & (document[:, None] == document[None, :])
    return tl.exp2(tl.where(visible, decay[:, None] - decay[None, :], -float("inf")))


@triton.jit
def _walk_kernel(
    k, v, systems, steps, documents, initial, written, states, final,
    k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, L, H, chunks,
    SK: tl.constexpr, SV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, HAS_SEQ: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u (B, L, H, P) and S (B, chunks, H, P, N) of every chunk, and the last state."""
    pid = tl.program_id(0).to(tl.int64)  # b, h
    b, h = pid // H, pid % H
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    k += b * k_sb + (h // SK) * k_sh
    v += b * v_sb + (h // SV) * v_sh
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_INITIAL:
        state = _load(initial + pid * P * N, N, p, n, P, N).to(tl.float32)
    for i in range(0, chunks):
        c = tl.cast(i, tl.int64)
        t = c * Q + q
        k_ = _load(k, k_sl, t, n, L, N)
        v_ = _load(v, v_sl, t, p, L, P)
        row = (pid * chunks + c) * Q
        T = _load(systems + row * Q, Q, q, q, Q, Q)
        beta, _, from_start, to_end, through = _load_decays(
            steps + row * 2, documents + (b * chunks + c) * Q, Q, HAS_SEQ
        )
        state_ = state.to(k_.dtype)
        _store(states + ((b * chunks + c) * H + h) * P * N, N, p, n, P, N, state_)
        held = tl.dot(k_, tl.trans(state_), input_precision=PRECISION)
        rest = beta[:, None] * (v_ - from_start[:, None] * held)
        u = tl.dot(T, rest.to(k_.dtype), input_precision=PRECISION)
        _store(written + (b * L * H + h) * P, H * P, t, p, L, P, u)
        kept = tl.trans((u * to_end[:, None]).to(k_.dtype))
        state = tl.dot(kept, k_, state * through, input_precision=PRECISION)
    if HAS_FINAL:
        _store(final + pid * P * N, N, p, n, P, N, state)


@triton.jit
def _output_kernel(
    q, k, steps, documents, written, states, out, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, L, H, chunks,
    SQ: tl.constexpr, SK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_SEQ: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk."""
    b, c, h = _place(tl.program_id(0), chunks, H)
    t, n = c * Q + tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_ = _load(q + b * q_sb + (h // SQ) * q_sh, q_sl, t, n, L, N)
    k_ = _load(k + b * k_sb + (h // SK) * k_sh, k_sl, t, n, L, N)
    place = b * chunks + c
    documents += place * Q
    _, decay, from_start, _, _ = _load_decays(steps + ((b * H + h) * chunks + c) * Q * 2, documents, Q, HAS_SEQ)
    state = _load(states + (place * H + h) * P * N, N, p, n, P, N)
    u = _load(written + (b * L * H + h) * P, H * P, t, p, L, P)
    y = tl.dot(q_, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
    mix = tl.dot(q_, tl.trans(k_), input_precision=PRECISION) * _within(decay, documents, Q, HAS_SEQ)
    y = tl.dot(mix.to(q_.dtype), u, y, input_precision=PRECISION)
    _store(out + (b * L * H + h) * P, H * P, t, p, L, P, y)


@triton.jit
def _values_kernel(
    q, k, dy, steps, documents, d_written, q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, dy_sb, dy_sl, dy_sh, L, H, chunks,
    SQ: tl.constexpr, SK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_SEQ: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of one chunk give du."""
    b, c, h = _place(tl.program_id(0), chunks, H)
    t, n = c * Q + tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_ = _load(q + b * q_sb + (h // SQ) * q_sh, q_sl, t, n, L, N)
    k_ = _load(k + b * k_sb + (h // SK) * k_sh, k_sl, t, n, L, N)
    dy_ = _load(dy + b * dy_sb + h * dy_sh, dy_sl, t, p, L, P)
    _, decay, _ = _load_steps(steps + ((b * H + h) * chunks + c) * Q * 2, Q)
    mix = tl.dot(q_, tl.trans(k_), input_precision=PRECISION)
    mix *= _within(decay, documents + (b * chunks + c) * Q, Q, HAS_SEQ)
    du = tl.dot(tl.trans(mix.to(q_.dtype)), dy_, input_precision=PRECISION)
    _store(d_written + (b * L * H + h) * P, H * P, t, p, L, P, du)


@triton.jit
def _walk_back_kernel(
    q, k, dy, systems, steps, documents, d_final, d_written, d_rest, adjoints, d_initial,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, dy_sb, dy_sl, dy_sh, L, H, chunks,
    SQ: tl.constexpr, SK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dr (B, L, H, P) and G (B, chunks, H, P, N) of every chunk, and the gradient of the first state."""
    pid = tl.program_id(0).to(tl.int64)  # b, h
    b, h = pid // H, pid % H
    rows, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    q += b * q_sb + (h // SQ) * q_sh
    k += b * k_sb + (h // SK) * k_sh
    dy += b * dy_sb + h * dy_sh
    adjoint = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_FINAL:
        adjoint = _load(d_final + pid * P * N, N, p, n, P, N).to(tl.float32)
    for i in range(0, chunks):
        c = tl.cast(chunks - 1 - i, tl.int64)
        t = c * Q + rows
        q_ = _load(q, q_sl, t, n, L, N)
        k_ = _load(k, k_sl, t, n, L, N)
        dy_ = _load(dy, dy_sl, t, p, L, P)
        du = _load(d_written + (b * L * H + h) * P, H * P, t, p, L, P)
        row = (pid * chunks + c) * Q
        T = _load(systems + row * Q, Q, rows, rows, Q, Q)
        beta, _, from_start, to_end, through = _load_decays(
            steps + row * 2, documents + (b * chunks + c) * Q, Q, HAS_SEQ
        )
        adjoint_ = adjoint.to(k_.dtype)
        _store(adjoints + ((b * chunks + c) * H + h) * P * N, N, p, n, P, N, adjoint_)
        du += tl.dot(k_, tl.trans(adjoint_), input_precision=PRECISION) * to_end[:, None]
        dr = tl.dot(tl.trans(T), du.to(k_.dtype), input_precision=PRECISION)
        _store(d_rest + (b * L * H + h) * P, H * P, t, p, L, P, dr)
        read = tl.trans((dy_ * from_start[:, None]).to(k_.dtype))
        adjoint = tl.dot(read, q_, adjoint * through, input_precision=PRECISION)
        lost = tl.trans((dr * (-beta * from_start)[:, None]).to(k_.dtype))
        adjoint = tl.dot(lost, k_, adjoint, input_precision=PRECISION)
    if HAS_INITIAL:
        _store(d_initial + pid * P * N, N, p, n, P, N, adjoint)


@triton.jit
def _gradient_kernel(
    q, k, v, dy, steps, documents, written, d_rest, states, adjoints, dq, dk, dv, dg, d_beta,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, v_sb, v_sl, v_sh, dy_sb, dy_sl, dy_sh, L, H, chunks,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    HAS_SEQ: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one head. The order of the work keeps few tiles alive at a time."""
    b, c, h = _place(tl.program_id(0), chunks, H)
    rows, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    t = c * Q + rows
    place = b * chunks + c
    documents += place * Q
    head = (b * L * H + h) * P
    v += b * v_sb + (h // SV) * v_sh
    dy += b * dy_sb + h * dy_sh
    states += (place * H + h) * P * N
    adjoints += (place * H + h) * P * N
    q_ = _load(q + b * q_sb + (h // SQ) * q_sh, q_sl, t, n, L, N)
    k_ = _load(k + b * k_sb + (h // SK) * k_sh, k_sl, t, n, L, N)
    beta, decay, from_start, to_end, through = _load_decays(
        steps + ((b * H + h) * chunks + c) * Q * 2, documents, Q, HAS_SEQ
    )

    # Through what q reads: from the state that enters, and from what the tokens before wrote.
    dq_ = tl.zeros((Q, BLOCK_N), tl.float32)
    d_mix = tl.zeros((Q, Q), tl.float32)
    passed = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        dy_ = _load(dy, dy_sl, t, p, L, P)
        u = _load(written + head, H * P, t, p, L, P)
        state = _load(states, N, p, n, P, N)
        adjoint = _load(adjoints, N, p, n, P, N)
        passed += tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 0)
        dq_ = tl.dot(dy_, state, dq_, input_precision=PRECISION)
        d_mix = tl.dot(dy_, tl.trans(u), d_mix, input_precision=PRECISION)
    dq_ *= from_start[:, None]
    after = tl.sum(dq_ * q_, 1)
    d_mix *= _within(decay, documents, Q, HAS_SEQ)
    # A token's own pair does not depend on any decay: left out of these sums, its rounding stays out of them too.
    below = rows[:, None] > rows[None, :]
    each = tl.where(below, d_mix * tl.dot(q_, tl.trans(k_), input_precision=PRECISION), 0.0)
    after += tl.sum(each, 1) - tl.sum(each, 0)
    d_scores = d_mix.to(k_.dtype)
    dq_ = tl.dot(d_scores, k_, dq_, input_precision=PRECISION)
    _store(dq + (b * L * H + h) * N, H * N, t, n, L, N, dq_)

    # Through what the tokens write: by what the state held under their keys, and by each other's keys.
    dk_ = tl.zeros((Q, BLOCK_N), tl.float32)
    d_system = tl.zeros((Q, Q), tl.float32)
    d_rate = tl.zeros((Q,), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        u = _load(written + head, H * P, t, p, L, P)
        v_ = _load(v, v_sl, t, p, L, P)
        dr = _load(d_rest + head, H * P, t, p, L, P)
        state = _load(states, N, p, n, P, N)
        dk_ = tl.dot(dr, state, dk_, input_precision=PRECISION)
        d_system = tl.dot(dr, tl.trans(u), d_system, input_precision=PRECISION)
        d_rate += tl.sum(dr.to(tl.float32) * v_.to(tl.float32), 1)
        _store(dv + head, H * P, t, p, L, P, dr * beta[:, None])
    dk_ *= -from_start[:, None]
    held = tl.sum(dk_ * k_, 1)
    d_rate += held
    after += held * beta
    dk_ *= beta[:, None]
    d_system = tl.where(below, -d_system * _within(decay, documents, Q, HAS_SEQ), 0.0)
    each = d_system * tl.dot(k_, tl.trans(k_), input_precision=PRECISION)
    d_rate += tl.sum(each, 1)
    each *= beta[:, None]
    after += tl.sum(each, 1) - tl.sum(each, 0)
    d_pairs = (d_system * beta[:, None]).to(k_.dtype)
    dk_ = tl.dot(d_pairs, k_, dk_, input_precision=PRECISION)
    dk_ = tl.dot(tl.trans(d_pairs), k_, dk_, input_precision=PRECISION)
    dk_ = tl.dot(tl.trans(d_scores), q_, dk_, input_precision=PRECISION)

    # Through the state that leaves.
    others = tl.sum(dk_ * k_, 1)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        u = _load(written + head, H * P, t, p, L, P)
        adjoint = _load(adjoints, N, p, n, P, N)
        dk_ = tl.dot((u * to_end[:, None]).to(k_.dtype), adjoint, dk_, input_precision=PRECISION)
    _store(dk + (b * L * H + h) * N, H * N, t, n, L, N, dk_)
    before = tl.sum(dk_ * k_, 1) - others

    # The log decay of token j acts on what passes it: pairs s < j <= t, the state entering before it, the keys before
    # it on their way to the end, and the state that passes the whole chunk.
    d_log = _before_and_after(before, after, False, Q) + tl.sum(passed, 0) * through
    at = (b * L + t) * H + h
    tl.store(dg + at, d_log.to(dg.dtype.element_ty), mask=t < L)
    tl.store(d_beta + at, d_rate.to(d_beta.dtype.element_ty), mask=t < L)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class _Inputs(NamedTuple):
    """The first arguments of delta_scan."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class _Scan:
    """What all launches of one scan share."""

    def __init__(self, inputs, chunk_size, packed):
        q, k, v, g, _ = inputs
        self.batch, self.length, self.heads = g.shape
        self.P, self.N = v.shape[-1], k.shape[-1]
        self.SQ, self.SK, self.SV = (self.heads // t.shape[2] for t in (q, k, v))
        self.Q = chunk_length(chunk_size)
        self.chunks = -(-self.length // self.Q)
        self.per_chunk = self.batch * self.chunks * self.heads
        self.sizes = self.length, self.heads, self.chunks  # as all kernels take them
        self.common = {
            "N": self.N, "Q": self.Q, "HAS_SEQ": packed, "BLOCK_N": max(16, power_of_2(self.N)),
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
        }  # fmt: skip
        self.block = block_size(self.P, self.N, k.dtype)

    def rows(self, block):
        """The blocks of `block` rows of a state: how many, and the constants that say so."""
        return -(-self.P // block), {"P": self.P, "BLOCK_P": block}

    def walk(self, device):
        """The grid of a walk and its constants; where blocks are fewer than multiprocessors, they are made smaller."""
        block, walks = self.block, self.batch * self.heads
        while block > 16 and walks * -(-self.P // block) < sm_count(device):
            block //= 2
        blocks, constants = self.rows(block)
        return (walks, blocks), constants | self.common


def _forward(run, *args):
    *inputs, initial_state, seq_idx, return_final_state, chunk_size, training = args
    q, k, v, g, beta = inputs = _Inputs(*inputs)
    scan = _Scan(inputs, chunk_size, seq_idx is not None)
    batch, heads, P, N, Q, chunks = scan.batch, scan.heads, scan.P, scan.N, scan.Q, scan.chunks
    systems = run.new(batch, heads, chunks * Q, Q, dtype=k.dtype)
    steps = run.new(batch, heads, chunks * Q, 2)
    documents = run.new(*(0,) if seq_idx is None else (batch, chunks * Q), dtype=torch.int32)
    run(
        _system_kernel, (scan.per_chunk,),
        k, g, beta, seq_idx, systems, steps, documents, *k.stride()[:3], *g.stride(), *beta.stride(),
        *((0, 0) if seq_idx is None else seq_idx.stride()), *scan.sizes,
        SK=scan.SK, LEVELS=Q.bit_length() - 1, **scan.common, **config(N),
    )  # fmt: skip
    written = run.new(*g.shape, P, dtype=k.dtype)
    states = run.new(batch, chunks, heads, P, N, dtype=k.dtype)
    final = run.new(*(batch, heads, P, N) if return_final_state else (0,))
    grid, constants = scan.walk(k.device)
    run(
        _walk_kernel, grid,
        k, v, systems, steps, documents, initial_state, written, states, final, *k.stride()[:3], *v.stride()[:3],
        *scan.sizes, SK=scan.SK, SV=scan.SV, HAS_INITIAL=initial_state is not None, HAS_FINAL=return_final_state,
        **constants, **config(N),
    )  # fmt: skip
    out = run.like(written)
    blocks, constants = scan.rows(scan.block)
    run(
        _output_kernel, (scan.per_chunk, blocks),
        q, k, steps, documents, written, states, out, *q.stride()[:3], *k.stride()[:3], *scan.sizes,
        SQ=scan.SQ, SK=scan.SK, **constants, **scan.common, **config(N),
    )  # fmt: skip
    if not training:
        return out, final, *(run.new(0, dtype=t.dtype) for t in (systems, steps, documents, written, states))
    if run.dry:
        initial_grad = initial_state is not None and initial_state.requires_grad
        _gradients(run, out, None, *inputs, systems, steps, documents, written, states, initial_grad, chunk_size)
    return out, final, systems, steps, documents, written, states


def _gradients(run, dy, d_final, *args):
    *inputs, systems, steps, documents, written, states, initial_grad, chunk_size = args
    q, k, v, g, beta = inputs = _Inputs(*inputs)
    scan = _Scan(inputs, chunk_size, documents.numel() > 0)
    shares = {"SQ": scan.SQ, "SK": scan.SK}
    strides = *q.stride()[:3], *k.stride()[:3]
    d_written = run.like(written)
    blocks, by_block = scan.rows(scan.block)
    run(
        _values_kernel, (scan.per_chunk, blocks),
        q, k, dy, steps, documents, d_written, *strides, *dy.stride()[:3], *scan.sizes,
        **shares, **by_block, **scan.common, **config(scan.N),
    )  # fmt: skip
    d_rest, adjoints = run.like(written), run.like(states)
    d_initial = run.new(*(scan.batch, scan.heads, scan.P, scan.N) if initial_grad else (0,))
    grid, constants = scan.walk(k.device)
    run(
        _walk_back_kernel, grid,
        q, k, dy, systems, steps, documents, d_final, d_written, d_rest, adjoints, d_initial, *strides,
        *dy.stride()[:3], *scan.sizes, HAS_FINAL=d_final is not None, HAS_INITIAL=initial_grad, **shares, **constants,
        **config(scan.N),
    )  # fmt: skip
    # Those of shared heads are summed: until then they are float32.
    dq, dk, dv = (
        run.new(*g.shape, t.shape[-1], dtype=t.dtype if t.shape[2] == scan.heads else torch.float32) for t in (q, k, v)
    )
    dg, d_beta = run.like(g), run.like(beta)
    run(
        _gradient_kernel, (scan.per_chunk,),
        q, k, v, dy, steps, documents, written, d_rest, states, adjoints, dq, dk, dv, dg, d_beta,
        *strides, *v.stride()[:3], *dy.stride()[:3], *scan.sizes, SV=scan.SV, **shares, **by_block, **scan.common,
        **config(scan.N, tile=scan.Q * scan.N),
    )  # fmt: skip
    return dq, dk, dv, dg, d_beta, d_initial


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def delta_scan_backward(
    dy: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    systems: Tensor,
    steps: Tensor,
    documents: Tensor,
    written: Tensor,
    states: Tensor,
    initial_grad: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, and float32 of the initial state."""
    dq, dk, dv, *others = launched(
        _gradients, inner_contiguous(dy), d_final, q, k, v, g, beta, systems, steps, documents, written, states,
        initial_grad, chunk_size,
    )  # fmt: skip
    dq, dk, dv = (
        grad if t.shape == grad.shape else grad.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype)
        for t, grad in ((q, dq), (k, dk), (v, dv))
    )
    return dq, dk, dv, *others


def _fake_gradients(dy, d_final, *args):
    *inputs, _, _, _, _, _, initial_grad, _ = args
    q, k, v, g, beta = inputs
    shape = (*g.shape[::2], v.shape[-1], k.shape[-1]) if initial_grad else (0,)
    return *(t.new_empty(t.shape) for t in inputs), q.new_empty(shape, dtype=torch.float32)


delta_scan_backward = CustomOp(
    delta_scan_backward, _fake_gradients, **once("delta_scan", remedy="; backend='torch' can")
)


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    return_final_state: bool,
    chunk_size: int | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The scan; see transpoint.kernels.delta. q, k and v of one dtype, and contiguous in their last dimension.

    Returns:
        out (B, L, H, P) and the final state (B, H, P, N), empty unless asked for; and for the backward pass, empty
        unless training: T (B, H, chunks * Q, Q), beta and decays (B, H, chunks * Q, 2), the documents (B, chunks * Q),
        u (B, L, H, P), and the states entering the chunks (B, chunks, H, P, N).
    """
    return launched(
        _forward, q, k, v, g, beta, initial_state, seq_idx, return_final_state, chunk_size, training,
    )  # fmt: skip


def _fake(q, k, v, g, beta, initial_state, seq_idx, return_final_state, chunk_size, training):
    batch, length, heads = g.shape
    P, N, Q = v.shape[-1], k.shape[-1], chunk_length(chunk_size)
    chunks = (length + Q - 1) // Q

    def kept(*shape, dtype=k.dtype, when=True):
        return k.new_empty(shape if training and when else (0,), dtype=dtype)

    return (
        k.new_empty(batch, length, heads, P),
        k.new_empty((batch, heads, P, N) if return_final_state else (0,), dtype=torch.float32),
        kept(batch, heads, chunks * Q, Q),
        kept(batch, heads, chunks * Q, 2, dtype=torch.float32),
        kept(batch, chunks * Q, dtype=torch.int32, when=seq_idx is not None),
        kept(batch, length, heads, P),
        kept(batch, chunks, heads, P, N),
    )


def _save(ctx, inputs, output):
    *inputs, initial_state, _, _, ctx.chunk_size, _ = inputs
    ctx.set_materialize_grads(False)  # else zeros are made for every output that is only for the backward pass
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, dy, d_final, *_):
    _, _, v, g, *_ = ctx.saved_tensors
    initial_grad = ctx.initial_dtype is not None and ctx.needs_input_grad[5]
    if dy is None:
        dy = v.new_zeros(*g.shape, v.shape[-1])
    *grads, d_initial = delta_scan_backward(
        dy, None if d_final is None else d_final.contiguous(), *ctx.saved_tensors, initial_grad, ctx.chunk_size
    )
    return *grads, d_initial.to(ctx.initial_dtype) if initial_grad else None, None, None, None, None


delta_scan = CustomOp(delta_scan, _fake, save=_save, gradients=_backward)
