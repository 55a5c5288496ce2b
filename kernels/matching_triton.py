"""Triton kernels of the distance between mixing matrices, forward and backward, registered as torch custom ops.

With P the attention matrix and M the state-space matrix of one head, D = sum (P - M)^2, and b_t the sum of the log
decays up to token t:

    M_ts = C_t.B_s dt_s exp(b_t - b_s)        G = dD/dM = 2 (M - P)        W = G M, below the diagonal
    dC_t = sum_s G_ts dt_s exp(b_t - b_s) B_s                          dB_s = dt_s sum_t G_ts exp(b_t - b_s) C_t
    ddt_s = sum_t G_ts C_t.B_s exp(b_t - b_s) + A dlog_s               dlog_j = sum_{t >= j > s} W_ts

As in flash attention (Dao et al. 2022, arXiv 2205.14135), a program owns a block of rows (or of columns) and walks its
tiles. `_forward_kernel` needs one pass: with a running maximum, the sums of P^2 and P M of a row can be rescaled, as
its sum of exponentials is. `_rows_kernel` and `_columns_kernel` compute P and M again, for dC and for dB: what a
program owns, it sums in registers, over the heads that share it too, so nothing is added up in a changing order.

`_decay_kernel` leaves b in float64, split into two float32 numbers: the difference of two such pairs is as exact as
float32 is, however long the sequence. Off the diagonal a decay is a product: from s to the end of the columns' tile,
from there to the start of the rows' tile, from there to t. All factors are at most 1, so nothing overflows; the first
and the last are left by `_decay_kernel` as vectors. Tiles in which all decays are below 2^-REACH are left out, as are
those of other documents or out of the window.

Everything exponential is in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import interpreted, power_of_2, sm_count
from .custom_op import CustomOp, once
from .launch import launched

LOG2E = tl.constexpr(1.4426950408889634)
REACH = tl.constexpr(64.0)  # 2^-64 is 5e-20: what decays further is far below float32's rounding of what does not
NEVER = tl.constexpr(2**31 - 1)
LONGEST_BLOCK = 128  # rows of vectors in memory are padded to a multiple of this


# ---------------------------------------------------------------------------------------------------------------------
# Launch parameters


def precision(dtype: torch.dtype, size: int) -> str:
    """How to multiply matrices: "half" on tensor cores, float32 as three products in TF32 or exactly, or in TF32."""
    if dtype != torch.float32:
        return "half"
    if torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "tf32x3" if size <= 64 else "ieee"  # three products of large operands do not fit into registers


def config(kernel: str, P: int, N: int, precision: str) -> dict:
    """Rows T and columns S of a tile, size D of those on the diagonal, warps and pipeline stages of a kernel.

    The block that a program owns (T rows for "forward" and "rows", S columns for "columns") is a multiple of the other
    side of a tile, which is a multiple of D and the same for "rows" and "columns".
    """
    size = max(P, N)
    if interpreted():  # small, so that short sequences have several tiles
        own, tile, diagonal, warps, stages = 32, 16, 16, 1, 1
    elif precision == "half":
        own, tile, diagonal, warps, stages = (64, 64, 32, 4, 2) if size <= 128 else (128, 32, 32, 8, 2)
    elif size <= 64:
        own, tile, diagonal, warps, stages = 64, 32, 32, 4, 1
    elif precision == "tf32" and kernel == "forward":
        own, tile, diagonal, warps, stages = 64, 32, 16, 8, 1
    else:
        own, tile, diagonal, warps, stages = 32, 32, 32, 8, 1
    T, S = (tile, own) if kernel == "columns" else (own, tile)
    return {"T": T, "S": S, "D": diagonal, "num_warps": warps, "num_stages": stages}


def _splits(programs: int, sharing: int, device: torch.device) -> int:
    """How many programs to cut the sum over `sharing` heads into, so that there are enough of them."""
    splits = 1
    while programs * splits < 2 * sm_count(device) and sharing % (2 * splits) == 0:
        splits *= 2
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _step_size(dt, dt_bias, b, t, h, sb, sl, sh, valid, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """dt before and after the softplus, in float64."""
    raw = tl.load(dt + b * sb + t * sl + h * sh, mask=valid, other=0.0).to(tl.float64)
    if HAS_BIAS:
        raw += tl.load(dt_bias + h).to(tl.float64)
    step = raw
    if SOFTPLUS:
        small = tl.exp(tl.minimum(raw, 30.0))  # log(1 + small) has no digits left where small is below 1e-9
        step = tl.where(raw > 30.0, raw, tl.where(raw < -20.0, small, tl.log(1.0 + small)))
    return raw, tl.where(valid, step, 0.0)


@triton.jit
def _valid(mask, b, t, L, sb, sl, HAS_MASK: tl.constexpr):
    """Which t are tokens, and no padding."""
    valid = (t >= 0) & (t < L)
    if HAS_MASK:
        valid = valid & (tl.load(mask + b * sb + t.to(tl.int64) * sl, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _changes(seq_idx, b, t, L, sb, sl):
    """At which t a document begins, other than the first."""
    inside = (t > 0) & (t < L)
    place = seq_idx + b * sb + t.to(tl.int64) * sl
    return tl.load(place, mask=inside, other=0) != tl.load(place - sl, mask=inside, other=0)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sooner(a, b):
    return tl.minimum(a, b)


@triton.jit(do_not_specialize=["L"])
def _decay_kernel(
    dt, dt_bias, A, seq_idx, mask, decay, documents,
    dt_sb, dt_sl, dt_sh, seq_sb, seq_sl, mask_sb, mask_sl, L, H, pitch, plane, documents_plane,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of one row: five vectors of `pitch` tokens; past the end, steps are 0.

    Step sizes; the two parts of b, in base 2; the decay from each token to the end of its tile, times its step; the
    decay from the start of its tile through each token, 0 for padding. The first head also leaves the first token and
    the end of each token's document; what padding is given there makes it see nothing, and be seen by nothing.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    rate = tl.load(A + h).to(tl.float64) * LOG2E
    sum_before = tl.zeros((), tl.float64)
    for start in range(0, pitch, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < pitch
        valid = _valid(mask, b, t, L, mask_sb, mask_sl, HAS_MASK)
        raw, step = _step_size(dt, dt_bias, b, t.to(tl.int64), h, dt_sb, dt_sl, dt_sh, valid, SOFTPLUS, HAS_BIAS)
        step = step.to(tl.float32)
        log_decay = tl.reshape(step.to(tl.float64) * rate, (BLOCK // TILE, TILE))
        in_tile = tl.cumsum(log_decay, 1)
        of_tile = tl.sum(log_decay, 1)
        before_tile = sum_before + tl.cumsum(of_tile, 0) - of_tile
        sum_before += tl.sum(of_tile, 0)
        total = tl.reshape(before_tile[:, None] + in_tile, (BLOCK,))
        to_end = tl.exp2(tl.reshape(of_tile[:, None] - in_tile, (BLOCK,)).to(tl.float32))
        from_start = tl.exp2(tl.reshape(in_tile, (BLOCK,)).to(tl.float32))
        high = total.to(tl.float32)
        place = decay + pid * pitch + t
        tl.store(place, step, mask=inside)
        tl.store(place + plane, high, mask=inside)
        tl.store(place + 2 * plane, (total - high.to(tl.float64)).to(tl.float32), mask=inside)
        tl.store(place + 3 * plane, to_end * step, mask=inside)
        tl.store(place + 4 * plane, tl.where(valid, from_start, 0.0), mask=inside)

    if HAS_SEQ or HAS_MASK:
        if h == 0:
            documents += b * pitch
            begin = tl.zeros((), tl.int32)
            end = tl.zeros((), tl.int32) + L
            for start in range(0, pitch, BLOCK):
                t = start + tl.arange(0, BLOCK)
                first = begin + tl.zeros((BLOCK,), tl.int32)
                if HAS_SEQ:
                    first = tl.where(_changes(seq_idx, b, t, L, seq_sb, seq_sl), t, first)
                    first = tl.associative_scan(first, 0, _later)
                    begin = tl.max(first, 0)
                valid = _valid(mask, b, t, L, mask_sb, mask_sl, HAS_MASK)
                tl.store(documents + t, tl.where(valid, first, NEVER), mask=t < pitch)

                t = pitch - 1 - t
                last = end + tl.zeros((BLOCK,), tl.int32)
                if HAS_SEQ:
                    last = tl.where(_changes(seq_idx, b, t + 1, L, seq_sb, seq_sl), t + 1, last)
                    last = tl.associative_scan(last, 0, _sooner)
                    end = tl.min(last, 0)
                valid = _valid(mask, b, t, L, mask_sb, mask_sl, HAS_MASK)
                tl.store(documents + documents_plane + t, tl.where(valid, last, 0), mask=t >= 0)


@triton.jit
def _load(base, start, stride, L, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Rows start.. of a (L, D) matrix, zeros where there are none; WHOLE: all of them are there."""
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    place = base + tl.cast(start, tl.int64) * stride + r * stride + d
    if WHOLE and D == BLOCK_D:
        return tl.load(place)
    mask = d < D
    if not WHOLE:
        mask = mask & (start + r < L)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _scores(left, right, cap_scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """left right^T, or with SOFTCAP tanh of a multiple of it; times `scale`, in the kernels, it is the logit."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if SOFTCAP:
        scores = 1.0 - 2.0 / (tl.exp2(scores * cap_scale) + 1.0)
    return scores


@triton.jit
def _gap(high, low, later, sooner):
    """b_later - b_sooner."""
    return (tl.load(high + later) - tl.load(high + sooner)) + (tl.load(low + later) - tl.load(low + sooner))


@triton.jit
def _matrix_start(high, low, t0, first, S: tl.constexpr):
    """The start of the first tile of columns, from `first` to t0, from which something is left in M at t0."""
    tiles = first // S
    pivot = tl.maximum(t0 - 1, 0)
    for start in range(tiles, t0 // S, 128):
        end = (start + 1 + tl.arange(0, 128)) * S - 1  # the last column of a tile
        gap = _gap(high, low, pivot, tl.minimum(end, pivot))
        tiles += tl.sum(((end < t0) & (gap < -REACH)).to(tl.int32), 0)
    return tiles * S


@triton.jit
def _matrix_end(high, low, start, last, T: tl.constexpr):
    """The end of the last tile of rows, from `start` on, that counts in M of the columns before it.

    last: the end of the columns' documents.
    """
    tiles = 0
    for first in range(start, last, 128 * T):
        begin = first + tl.arange(0, 128) * T
        inside = begin < last
        gap = _gap(high, low, tl.where(inside, begin, start - 1), start - 1)
        tiles += tl.sum((inside & (gap >= -REACH)).to(tl.int32), 0)
    return start + tiles * T


@triton.jit
def _exponent(high, low, place, pivot_high, pivot_low):
    """b_pivot - b of the tokens at `place`."""
    return (pivot_high - tl.load(high + place)) + (pivot_low - tl.load(low + place))


@triton.jit
def _add_product(acc, g, right, PRECISION: tl.constexpr):
    """acc + g right. Gradients may be out of float16's range: there both go through tf32, which has as many digits."""
    if right.dtype == tl.float16:
        right = right.to(tl.float32)
    return tl.dot(g.to(right.dtype), right, acc, input_precision=PRECISION)


@triton.jit
def _store(base, start, stride, value, L, N: tl.constexpr):
    r, d = tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    place = base + tl.cast(start, tl.int64) * stride + r * stride + d
    tl.store(place, value.to(base.dtype.element_ty), mask=(start + r < L) & (d < N))


@triton.jit
def _attend(scores, scale, maximum, total, squares):
    """Add a tile to the sums of p = exp(logit - maximum) and p^2; returns p and the factor of earlier sums, too."""
    new = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2((maximum - new) * scale)
    p = tl.exp2(scores * scale - (new * scale)[:, None])
    total = total * shrink + tl.sum(p, 1)
    squares = squares * (shrink * shrink) + tl.sum(p * p, 1)
    return p, shrink, new, total, squares


@triton.jit
def _first_seen(
    high, low, documents, t, t0, window, S: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """What rows t see. The first columns of each in M and in P, and where tiles before t0 start: the first that has
    anything, the first that is whole (of one document) for every row, the first of these in P, the first of these in M.
    """
    matrix_first = tl.zeros_like(t)
    start = t0 * 0
    whole = start
    if HAS_DOCS:
        matrix_first = tl.load(documents + t)
        start = tl.minimum(tl.min(matrix_first, 0), t0) // S * S
        last = tl.max(tl.where(matrix_first == NEVER, 0, matrix_first), 0)
        whole = tl.maximum(start, tl.minimum((last + S - 1) // S * S, t0))
    first = matrix_first
    attention = whole
    if HAS_WINDOW:
        first = tl.maximum(matrix_first, t - window + 1)
        attention = tl.maximum(whole, tl.minimum(tl.maximum(t0 - window + 1, 0), t0) // S * S)
    return matrix_first, first, start, whole, attention, _matrix_start(high, low, t0, whole, S)


@triton.jit(do_not_specialize=["L", "window", "batch"])
def _forward_kernel(
    q, k, B, C, decay, documents, lse, sums,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh,
    L, window, batch, H, K, HB, HC, pitch, plane, documents_plane, scale, cap_scale,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows t0.. of one head: their part of the distance and of the norm of P, and the log2-sum-exp2 of their logits."""
    blocks = tl.cdiv(L, T)
    pid = tl.program_id(0)
    row_block = blocks - 1 - pid % blocks  # the longest first
    bh = (pid // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * K // H) * k_sh
    B += b * B_sb + (h * HB // H) * B_sh
    C += b * C_sb + (h * HC // H) * C_sh
    step = decay + bh * pitch
    high, low, to_end = step + plane, step + 2 * plane, step + 3 * plane
    documents += b * pitch
    ends = documents + documents_plane

    t0 = row_block * T
    t = t0 + tl.arange(0, T)
    q_rows = _load(q, t0, q_sl, L, P, BLOCK_P, T, False)
    C_rows = _load(C, t0, C_sl, L, N, BLOCK_N, T, False)
    matrix_first, first, start, whole, attention, in_matrix = _first_seen(
        high, low, documents, t, t0, window, S, HAS_DOCS, HAS_WINDOW
    )

    # Sums over a row of p = exp(logit - maximum), p^2, p M and M^2, in which M is without the decay since t0 at first.
    # A finite first maximum: where nothing has been seen yet, no infinity is subtracted from another.
    maximum = tl.full((T,), -1e30, tl.float32)
    total = tl.zeros((T,), tl.float32)
    squares = tl.zeros((T,), tl.float32)
    products = tl.zeros((T,), tl.float32)
    matrix = tl.zeros((T,), tl.float32)

    for s0 in tl.range(attention, in_matrix, S):  # here M is zero
        s = s0 + tl.arange(0, S)
        k_rows = _load(k, s0, k_sl, L, P, BLOCK_P, S, True)
        scores = _scores(q_rows, k_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
        if HAS_WINDOW:
            scores = tl.where(s[None, :] >= first[:, None], scores, float("-inf"))
        if HAS_MASK:
            scores = tl.where((tl.load(ends + s) > 0)[None, :], scores, float("-inf"))
        p, shrink, maximum, total, squares = _attend(scores, scale, maximum, total, squares)

    pivot = tl.maximum(t0 - 1, 0)
    pivot_high, pivot_low = tl.load(high + pivot), tl.load(low + pivot)
    between = _exponent(high, low, tl.minimum(in_matrix + S - 1, pivot), pivot_high, pivot_low)
    for s0 in tl.range(in_matrix, t0, S):
        s = s0 + tl.arange(0, S)
        k_rows = _load(k, s0, k_sl, L, P, BLOCK_P, S, True)
        B_rows = _load(B, s0, B_sl, L, N, BLOCK_N, S, True)
        scores = _scores(q_rows, k_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
        m = tl.dot(C_rows, tl.trans(B_rows), input_precision=PRECISION)
        m *= (tl.load(to_end + s) * tl.exp2(between))[None, :]
        between = _exponent(high, low, tl.minimum(s0 + 2 * S - 1, pivot), pivot_high, pivot_low)  # of the next tile
        if HAS_WINDOW:
            scores = tl.where(s[None, :] >= first[:, None], scores, float("-inf"))
        if HAS_MASK:
            scores = tl.where((tl.load(ends + s) > 0)[None, :], scores, float("-inf"))
        p, shrink, maximum, total, squares = _attend(scores, scale, maximum, total, squares)
        products = products * shrink + tl.sum(p * m, 1)
        matrix += tl.sum(m * m, 1)
    row_high, row_low = tl.load(high + t), tl.load(low + t)
    factor = tl.exp2((row_high - pivot_high) + (row_low - pivot_low))
    products *= factor
    matrix *= factor * factor

    # The other tiles: those with a border of a document, and those on the diagonal.
    borders = (whole - start) // D
    for i in tl.range(0, borders + tl.cdiv(tl.minimum(t0 + T, L) - t0, D), num_stages=1):
        s0 = tl.where(i < borders, start + i * D, t0 + (i - borders) * D)
        s = s0 + tl.arange(0, D)
        k_rows = _load(k, s0, k_sl, L, P, BLOCK_P, D, False)
        B_rows = _load(B, s0, B_sl, L, N, BLOCK_N, D, False)
        scores = _scores(q_rows, k_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
        m = tl.dot(C_rows, tl.trans(B_rows), input_precision=PRECISION)
        exponent = _exponent(high, low, s[None, :], row_high[:, None], row_low[:, None])
        seen = (s[None, :] >= matrix_first[:, None]) & (s[None, :] <= t[:, None])
        m *= tl.exp2(tl.where(seen, exponent, float("-inf"))) * tl.load(step + s)[None, :]
        seen = (s[None, :] >= first[:, None]) & (s[None, :] <= t[:, None])
        if HAS_MASK:
            seen = seen & (tl.load(ends + s) > 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        p, shrink, maximum, total, squares = _attend(scores, scale, maximum, total, squares)
        products = products * shrink + tl.sum(p * m, 1)
        matrix += tl.sum(m * m, 1)

    counts = (t < L) & (matrix_first < NEVER)  # in other rows P is zero: an infinite sum makes it so afterwards
    inverse = 1.0 / tl.where(counts, total, 1.0)
    tl.store(lse + bh * pitch + t, tl.where(counts, maximum * scale - tl.log2(inverse), float("inf")))
    for past in range(t0 + T, tl.where(row_block == blocks - 1, pitch, 0), T):
        tl.store(lse + bh * pitch + past + tl.arange(0, T), tl.full((T,), float("inf"), tl.float32))
    squares = tl.where(counts, squares * inverse * inverse, 0.0)
    distance = tl.where(counts, squares - 2.0 * products * inverse + matrix, 0.0)
    place = sums + (bh * blocks + row_block) * 2
    tl.store(place, tl.sum(distance, 0))
    tl.store(place + 1, tl.sum(squares, 0))


@triton.jit
def _probability(scores, scale, lse, HAS_MASK: tl.constexpr):
    """P where it is not masked."""
    logit = scores * scale - lse
    if HAS_MASK:
        logit = tl.minimum(logit, 0.0)  # a padding column's may be anything: not infinite, as it is multiplied by 0
    return tl.exp2(logit)


@triton.jit(do_not_specialize=["L", "window", "batch", "splits"])
def _rows_kernel(
    q, k, B, C, decay, documents, lse, grad, dC, row_sums,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh,
    L, window, batch, H, K, HB, HC, pitch, plane, documents_plane, scale, cap_scale, sharing, splits,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows t0.. of one head of C: dC, summed over `sharing` of the heads that read it; these heads' row sums of W."""
    blocks = tl.cdiv(L, T)
    pid = tl.program_id(0)
    t0 = (blocks - 1 - pid % blocks) * T
    part = (pid // blocks).to(tl.int64)  # of b, head of C and split
    b, head, split = part // splits // HC, part // splits % HC, part % splits
    t = t0 + tl.arange(0, T)
    C_rows = _load(C + b * C_sb + head * C_sh, t0, C_sl, L, N, BLOCK_N, T, False)
    if HAS_MASK:  # with this, M is zero in rows of padding, as P is by its infinite sum
        C_rows = tl.where((tl.load(documents + b * pitch + t) < NEVER)[:, None], C_rows, 0.0)
    grads = tl.zeros((T, BLOCK_N), tl.float32)
    for shared in range(sharing):
        h = (head * splits + split) * sharing + shared
        bh = b * H + h
        k_h = k + b * k_sb + (h * K // H) * k_sh
        B_h = B + b * B_sb + (h * HB // H) * B_sh
        step = decay + bh * pitch
        high, low, to_end = step + plane, step + 2 * plane, step + 3 * plane
        q_rows = _load(q + b * q_sb + h * q_sh, t0, q_sl, L, P, BLOCK_P, T, False)
        row_lse = tl.load(lse + bh * pitch + t)
        weight = 2.0 * tl.load(grad + bh)
        pivot = tl.maximum(t0 - 1, 0)
        pivot_high, pivot_low = tl.load(high + pivot), tl.load(low + pivot)
        row_high, row_low = tl.load(high + t), tl.load(low + t)
        factor = tl.exp2((row_high - pivot_high) + (row_low - pivot_low))
        matrix_first, first, start, whole, attention, in_matrix = _first_seen(
            high, low, documents + b * pitch, t, t0, window, S, HAS_DOCS, HAS_WINDOW
        )
        between = _exponent(high, low, tl.minimum(in_matrix + S - 1, pivot), pivot_high, pivot_low)
        w = tl.zeros((T,), tl.float32)
        acc = tl.zeros((T, BLOCK_N), tl.float32)
        for s0 in tl.range(in_matrix, t0, S):
            s = s0 + tl.arange(0, S)
            k_rows = _load(k_h, s0, k_sl, L, P, BLOCK_P, S, True)
            B_rows = _load(B_h, s0, B_sl, L, N, BLOCK_N, S, True)
            scores = _scores(q_rows, k_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
            m = tl.dot(C_rows, tl.trans(B_rows), input_precision=PRECISION)
            column = tl.load(to_end + s) * tl.exp2(between)
            between = _exponent(high, low, tl.minimum(s0 + 2 * S - 1, pivot), pivot_high, pivot_low)
            m *= column[None, :]
            p = _probability(scores, scale, row_lse[:, None], HAS_MASK)
            if HAS_WINDOW:
                p = tl.where(s[None, :] >= first[:, None], p, 0.0)
            g = m * factor[:, None] - p
            w += tl.sum(g * m, 1)
            g *= column[None, :]
            acc = _add_product(acc, g, B_rows, PRECISION)
        w *= factor
        acc *= factor[:, None]

        borders = (whole - start) // D
        for i in tl.range(0, borders + tl.cdiv(tl.minimum(t0 + T, L) - t0, D), num_stages=1):
            s0 = tl.where(i < borders, start + i * D, t0 + (i - borders) * D)
            s = s0 + tl.arange(0, D)
            k_rows = _load(k_h, s0, k_sl, L, P, BLOCK_P, D, False)
            B_rows = _load(B_h, s0, B_sl, L, N, BLOCK_N, D, False)
            scores = _scores(q_rows, k_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
            m = tl.dot(C_rows, tl.trans(B_rows), input_precision=PRECISION)
            exponent = _exponent(high, low, s[None, :], row_high[:, None], row_low[:, None])
            seen = (s[None, :] >= matrix_first[:, None]) & (s[None, :] <= t[:, None])
            decays = tl.exp2(tl.where(seen, exponent, float("-inf"))) * tl.load(step + s)[None, :]
            m *= decays
            seen = (s[None, :] >= first[:, None]) & (s[None, :] <= t[:, None])
            p = tl.where(seen, _probability(scores, scale, row_lse[:, None], HAS_MASK), 0.0)
            g = m - p
            w += tl.sum(tl.where(s[None, :] < t[:, None], g * m, 0.0), 1)
            g *= decays
            acc = _add_product(acc, g, B_rows, PRECISION)
        grads += acc * weight
        tl.store(row_sums + bh * pitch + t, w * weight)
    _store(dC + ((split * batch + b) * L * HC + head) * N, t0, HC * N, grads, L, N)


@triton.jit(do_not_specialize=["L", "window", "batch", "splits"])
def _columns_kernel(
    q, k, B, C, decay, documents, lse, grad, dB, direct, column_sums,
    q_sb, q_sl, q_sh, k_sb, k_sl, k_sh, B_sb, B_sl, B_sh, C_sb, C_sl, C_sh,
    L, window, batch, H, K, HB, HC, pitch, plane, documents_plane, scale, cap_scale, sharing, splits,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TEACHER_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns s0.. of one head of B: dB, summed over `sharing` of the heads that read it; these heads' column sums of W
    and of dD/dM C.B exp(b_t - b_s). The tiles are transposed, (S, T)."""
    blocks = tl.cdiv(L, S)
    pid = tl.program_id(0)
    s0 = (pid % blocks) * S  # the longest first
    part = (pid // blocks).to(tl.int64)
    b, head, split = part // splits // HB, part // splits % HB, part % splits
    s = s0 + tl.arange(0, S)
    B_rows = _load(B + b * B_sb + head * B_sh, s0, B_sl, L, N, BLOCK_N, S, False)
    matrix_end = tl.zeros_like(s) + L  # of the rows that columns s have in M, and in P
    if HAS_DOCS:
        matrix_end = tl.load(documents + documents_plane + b * pitch + s)
    last = tl.max(matrix_end, 0)  # and the most and the least of any that is no padding
    least = tl.min(tl.where(matrix_end == 0, L, matrix_end), 0)
    end = matrix_end
    if HAS_WINDOW:
        end = tl.minimum(matrix_end, s + window)
    grads = tl.zeros((S, BLOCK_N), tl.float32)
    for shared in range(sharing):
        h = (head * splits + split) * sharing + shared
        bh = b * H + h
        q_h = q + b * q_sb + h * q_sh
        C_h = C + b * C_sb + (h * HC // H) * C_sh
        high, low = decay + bh * pitch + plane, decay + bh * pitch + 2 * plane
        from_start = decay + bh * pitch + 4 * plane
        k_rows = _load(k + b * k_sb + (h * K // H) * k_sh, s0, k_sl, L, P, BLOCK_P, S, False)
        step = tl.load(decay + bh * pitch + s)
        weight = 2.0 * tl.load(grad + bh)
        pivot = s0 + S - 1
        pivot_high, pivot_low = tl.load(high + pivot), tl.load(low + pivot)
        column_high, column_low = tl.load(high + s), tl.load(low + s)
        factor = tl.exp2((pivot_high - column_high) + (pivot_low - column_low))
        step_factor = factor * step
        between = _exponent(high, low, pivot, pivot_high, pivot_low)
        e = tl.zeros((S,), tl.float32)
        acc = tl.zeros((S, BLOCK_N), tl.float32)
        stop = _matrix_end(high, low, s0 + S, last, T)
        whole = stop  # tiles up to here are of one document
        if HAS_DOCS:
            whole = tl.where(least == L, stop, tl.minimum(stop, s0 + S + tl.maximum(least - s0 - S, 0) // T * T))
        for t0 in tl.range(s0 + S, whole, T):
            t = t0 + tl.arange(0, T)
            q_rows = _load(q_h, t0, q_sl, L, P, BLOCK_P, T, False)
            C_rows = _load(C_h, t0, C_sl, L, N, BLOCK_N, T, False)
            scores = _scores(k_rows, q_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
            m = tl.dot(B_rows, tl.trans(C_rows), input_precision=PRECISION)
            row = tl.load(from_start + t) * tl.exp2(-between)
            between = _exponent(high, low, t0 + T - 1, pivot_high, pivot_low)  # of the next tile
            m *= row[None, :]
            row_lse = tl.load(lse + bh * pitch + t)
            p = _probability(scores, scale, row_lse[None, :], HAS_MASK)
            if HAS_WINDOW:
                p = tl.where(t[None, :] < end[:, None], p, 0.0)
            g = m * step_factor[:, None] - p
            e += tl.sum(g * m, 1)
            g *= row[None, :]
            acc = _add_product(acc, g, C_rows, PRECISION)
        e *= factor
        acc *= step_factor[:, None]

        on_diagonal = tl.zeros((S,), tl.float32)
        diagonal = tl.cdiv(tl.minimum(s0 + S, L) - s0, D)
        for i in tl.range(0, diagonal + (stop - whole) // D, num_stages=1):
            t0 = tl.where(i < diagonal, s0 + i * D, whole + (i - diagonal) * D)
            t = t0 + tl.arange(0, D)
            q_rows = _load(q_h, t0, q_sl, L, P, BLOCK_P, D, False)
            C_rows = _load(C_h, t0, C_sl, L, N, BLOCK_N, D, False)
            scores = _scores(k_rows, q_rows, cap_scale, SOFTCAP, TEACHER_PRECISION)
            m = tl.dot(B_rows, tl.trans(C_rows), input_precision=PRECISION)
            exponent = -_exponent(high, low, t[None, :], column_high[:, None], column_low[:, None])
            row_lse = tl.load(lse + bh * pitch + t)
            seen = (t[None, :] >= s[:, None]) & (t[None, :] < matrix_end[:, None])
            if HAS_MASK:
                seen = seen & (row_lse < float("inf"))[None, :]
            decays = tl.exp2(tl.where(seen, exponent, float("-inf")))
            m *= decays
            seen = (t[None, :] >= s[:, None]) & (t[None, :] < end[:, None])
            p = tl.where(seen, _probability(scores, scale, row_lse[None, :], HAS_MASK), 0.0)
            g = m * step[:, None] - p
            e += tl.sum(tl.where(t[None, :] > s[:, None], g * m, 0.0), 1)
            on_diagonal += tl.sum(tl.where(t[None, :] == s[:, None], g * m, 0.0), 1)
            g *= decays * step[:, None]
            acc = _add_product(acc, g, C_rows, PRECISION)
        grads += acc * weight
        tl.store(direct + bh * pitch + s, (e + on_diagonal) * weight)
        tl.store(column_sums + bh * pitch + s, e * step * weight)
    _store(dB + ((split * batch + b) * L * HB + head) * N, s0, HB * N, grads, L, N)


@triton.jit
def _add_unless_erased(erased, total, erased_later, total_later):
    return erased | erased_later, tl.where(erased_later > 0, total_later, total + total_later)


@triton.jit(do_not_specialize=["L"])
def _steps_backward_kernel(
    dt, dt_bias, A, mask, row_sums, direct, column_sums, ddt, sums,
    dt_sb, dt_sl, dt_sh, mask_sb, mask_sl, L, H, pitch,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row: ddt, and its parts of dA and of the bias's gradient. From the last token back."""
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    rate = tl.load(A + h).to(tl.float64)
    later = tl.zeros((), tl.float64)
    rate_grad = tl.zeros((), tl.float64)
    bias_grad = tl.zeros((), tl.float64)
    for start in range(0, L, BLOCK):
        t = (L - 1 - start - tl.arange(0, BLOCK)).to(tl.int64)
        token = t >= 0
        valid = _valid(mask, b, t, L, mask_sb, mask_sl, HAS_MASK)
        raw, step = _step_size(dt, dt_bias, b, t, h, dt_sb, dt_sl, dt_sh, valid, SOFTPLUS, HAS_BIAS)
        place = pid * pitch + t
        w = tl.load(row_sums + place, mask=token, other=0.0).to(tl.float64)
        w -= tl.load(column_sums + place, mask=token, other=0.0).to(tl.float64)
        # Where a token's own decay leaves nothing, neither does the sum: what it would have is rounding, to be dropped.
        erased = (step * rate * LOG2E < -REACH).to(tl.int32)
        erased, log_grad = tl.associative_scan((erased, tl.where(erased > 0, 0.0, w)), 0, _add_unless_erased)
        log_grad += tl.where(erased > 0, 0.0, later)
        later = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, log_grad, 0.0), 0)
        rate_grad += tl.sum(step * log_grad, 0)
        grad = tl.load(direct + place, mask=token, other=0.0).to(tl.float64) + rate * log_grad
        if SOFTPLUS:
            grad *= 1.0 / (1.0 + tl.exp(-tl.maximum(raw, -700.0)))
        grad = tl.where(valid, grad, 0.0)
        bias_grad += tl.sum(grad, 0)
        tl.store(ddt + (b * L + t) * H + h, grad.to(ddt.dtype.element_ty), mask=token)
    tl.store(sums + pid * 2, rate_grad.to(tl.float32))
    tl.store(sums + pid * 2 + 1, bias_grad.to(tl.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Launches


class _Matching:
    """What the kernels of one call have in common."""

    def __init__(self, run, q, k, dt, A, B, C, dt_bias, seq_idx, mask, scale, dt_softplus, window, softcap):
        self.run = run
        self.tensors = q, k, B, C
        self.batch, self.length, self.heads = dt.shape
        self.head_dim, self.state = q.shape[-1], B.shape[-1]
        self.pitch = -(-self.length // LONGEST_BLOCK) * LONGEST_BLOCK

        self.steps = dt, dt_bias, A, mask
        self.steps_flags = {"SOFTPLUS": dt_softplus, "HAS_BIAS": dt_bias is not None, "HAS_MASK": mask is not None}
        self.seq_idx = seq_idx
        has_docs = seq_idx is not None or mask is not None
        self.decay = run.new(5, self.batch, self.heads, self.pitch)
        shape = (2, self.batch, self.pitch) if has_docs else (1,)
        self.documents = run.new(*shape, dtype=torch.int32)

        log2e = LOG2E.value
        self.numbers = (self.pitch, self.decay.stride(0), self.documents.stride(0))
        # With a cap, _scores gives tanh(score / softcap), from 2 score / softcap in base 2.
        self.numbers += (scale * log2e, 0.0) if softcap is None else (softcap * log2e, 2 * scale / softcap * log2e)
        size = max(self.head_dim, self.state)
        self.precision = precision(torch.promote_types(q.dtype, B.dtype), size)
        self.flags = {
            "P": self.head_dim, "N": self.state,
            "BLOCK_P": _padded(self.head_dim), "BLOCK_N": _padded(self.state),
            "HAS_DOCS": has_docs, "HAS_MASK": mask is not None, "HAS_WINDOW": window is not None,
            "SOFTCAP": softcap is not None,
            "TEACHER_PRECISION": self._input_precision(q), "PRECISION": self._input_precision(B),
        }  # fmt: skip
        self.window = window or 0

    def _block(self):
        """Tokens at a time in the kernels that walk whole rows."""
        return 128 if interpreted() else 1024

    def prepare(self, tile):
        """Run _decay_kernel: `decay` and `documents` of the tokens."""
        dt, dt_bias, A, mask = self.steps
        seq_idx = self.seq_idx
        self.run(
            _decay_kernel, (self.batch * self.heads,),
            dt, dt_bias, A, seq_idx, mask, self.decay, self.documents,
            *dt.stride(), *_strides(seq_idx), *_strides(mask), self.length, self.heads, *self.numbers[:3],
            **self.steps_flags, HAS_SEQ=seq_idx is not None, BLOCK=self._block(), TILE=tile, num_warps=4,
        )  # fmt: skip

    def config(self, kernel):
        return config(kernel, self.head_dim, self.state, self.precision)

    def _input_precision(self, t):
        """Triton's name of it; that of half precision does not matter."""
        return self.precision if t.dtype == torch.float32 else "tf32"

    def inputs(self):
        return *self.tensors, self.decay, self.documents

    def strides(self):
        return [stride for t in self.tensors for stride in t.stride()[:3]]

    def shape(self):
        return self.length, self.window, self.batch, self.heads, *(t.shape[2] for t in self.tensors[1:]), *self.numbers

    def vector(self):
        return self.run.new(self.batch, self.heads, self.pitch)

    def forward(self):
        """Distance and norm by blocks of rows (B, H, blocks, 2), and the log2-sum-exp2 of the logits (B, H, pitch)."""
        options = self.config("forward")
        self.prepare(options["S"])
        blocks = -(-self.length // options["T"])
        lse = self.vector()
        sums = self.run.new(self.batch, self.heads, blocks, 2)
        self.run(
            _forward_kernel, (blocks * self.batch * self.heads,),
            *self.inputs(), lse, sums, *self.strides(), *self.shape(),
            **self.flags, **options,
        )  # fmt: skip
        return sums, lse

    def backward(self, lse, grad):
        """Gradients of dt, B, C and (A, dt_bias), but dt's in parts that are still to be summed along dimension 0."""
        self.prepare(self.config("rows")["S"])
        row_sums, direct, column_sums = self.vector(), self.vector(), self.vector()
        dC = self._shared("rows", 3, "T", _rows_kernel, lse, grad, row_sums)
        dB = self._shared("columns", 2, "S", _columns_kernel, lse, grad, direct, column_sums)
        dt, dt_bias, A, mask = self.steps
        ddt = self.run.like(dt)
        sums = self.run.new(self.batch, self.heads, 2)
        self.run(
            _steps_backward_kernel, (self.batch * self.heads,),
            dt, dt_bias, A, mask, row_sums, direct, column_sums, ddt, sums,
            *dt.stride(), *_strides(mask), self.length, self.heads, self.pitch,
            **self.steps_flags, BLOCK=self._block(), num_warps=4,
        )  # fmt: skip
        return ddt, dB, dC, sums

    def _shared(self, name, operand, own, kernel, lse, grad, *vectors):
        """Run a kernel whose programs own a block of one head of B or C, for some of the heads that share it."""
        options = self.config(name)
        tensor = self.tensors[operand]
        heads = tensor.shape[2]
        programs = -(-self.length // options[own]) * self.batch * heads
        splits = _splits(programs, self.heads // heads, tensor.device)
        sharing = self.heads // heads // splits
        dtype = tensor.dtype if splits == 1 else torch.float32
        out = self.run.new(splits, *tensor.shape, dtype=dtype)
        self.run(
            kernel, (programs * splits,),
            *self.inputs(), lse, grad, out, *vectors, *self.strides(), *self.shape(), sharing, splits,
            **self.flags, **options,
        )  # fmt: skip
        return out


def _strides(t):
    return (0, 0) if t is None else t.stride()


def _padded(size):
    return max(16, power_of_2(size))


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _forward(run, *inputs):
    sums, lse = _Matching(run, *inputs).forward()
    if run.dry and any(t is not None and t.requires_grad for t in inputs[2:7]):
        _gradients(run, lse, run.new(*lse.shape[:2]), *inputs)
    return sums, lse


def _gradients(run, lse, grad, *inputs):
    return _Matching(run, *inputs).backward(lse, grad)


def mixing_distance_backward(
    lse: Tensor,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dt_softplus: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of dt, A, B, C and dt_bias (empty if there is none)."""
    inputs = q, k, dt, A, B, C, dt_bias, seq_idx, mask, scale, dt_softplus, window, softcap
    ddt, *parts, sums = launched(_gradients, lse, grad.contiguous(), *inputs)
    dB, dC = (part[0] if len(part) == 1 else part.sum(0).to(t.dtype) for part, t in zip(parts, (B, C), strict=True))
    dA, dbias = sums.sum(0).unbind(-1)
    return (
        ddt,
        dA.to(A.dtype, copy=True),
        dB,
        dC,
        A.new_empty(0) if dt_bias is None else dbias.to(dt_bias.dtype, copy=True),
    )


def _fake_gradients(lse, grad, q, k, dt, A, B, C, dt_bias, *_):
    bias = A.new_empty(0) if dt_bias is None else torch.empty_like(dt_bias)
    return *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (dt, A, B, C)), bias


mixing_distance_backward = CustomOp(
    mixing_distance_backward, _fake_gradients, **once("mixing_distance", remedy="; backend='torch' can")
)


def mixing_distance(
    q: Tensor,
    k: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dt_softplus: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distance (B, H), norm of the attention matrix (B, H), and what the backward pass needs; all float32."""
    sums, lse = launched(_forward, q, k, dt, A, B, C, dt_bias, seq_idx, mask, scale, dt_softplus, window, softcap)
    distance, norm = sums.sum(2).unbind(-1)
    return distance.clamp(min=0), norm.contiguous(), lse


def _fake(q, k, dt, A, B, C, dt_bias, seq_idx, mask, scale, dt_softplus, window, softcap):
    batch, length, heads = dt.shape
    pitch = (length + LONGEST_BLOCK - 1) // LONGEST_BLOCK * LONGEST_BLOCK
    shapes = (batch, heads), (batch, heads), (batch, heads, pitch)
    return tuple(dt.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.dt_softplus, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, grad, grad_norm, grad_lse):
    lse, *tensors = ctx.saved_tensors
    options = ctx.scale, ctx.dt_softplus, ctx.window, ctx.softcap
    ddt, dA, dB, dC, dbias = mixing_distance_backward(lse, grad, *tensors, *options)
    return None, None, ddt, dA, dB, dC, None if tensors[6] is None else dbias, None, None, None, None, None, None


mixing_distance = CustomOp(mixing_distance, _fake, save=_save, gradients=_backward)
