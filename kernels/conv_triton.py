"""Triton kernels of the causal depthwise convolution: forward, backward in one pass, and the decoding step.

A program walks along the tokens for a block of channels, with the last W - 1 rows in registers: every row is read once,
but for the W - 1 where two walks meet. The backward pass recomputes the pre-activation on the same walk; the gradient
of x follows W - 1 tokens behind, those of weight and bias stay in registers until the end.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import sm_count
from .custom_op import CustomOp, once
from .launch import launched

# Launch parameters. A program is a tile of S walks x block_c channels, a thread of it `vec` neighbouring channels of a
# walk: S = 32 * warps * vec / block_c. A walk loads `steps` tokens before it uses the first, `stages` - 1 times ahead,
# and does so at most `loops` times: less often if that makes fewer than `per_sm` programs for each multiprocessor.
FORWARD = {"block_c": 128, "vec": 8, "warps": 2, "steps": 8, "stages": 3, "loops": 2, "per_sm": 8}
BACKWARD = {"block_c": 128, "vec": 4, "warps": 2, "steps": 4, "stages": 3, "loops": 32, "per_sm": 8}
STEP = {"block_c": 256, "warps": 4}


def _parameters(table, x, others, seq_idx):
    """By the table, for x (B, L, C): a kernel's constants, loops, and the numbers of programs along L and along C."""
    batch, length, channels = x.shape
    # The strides of batches are passed in units of VEC elements, so that the compiler knows how far rows are aligned.
    vec = 1
    if all(t.data_ptr() % 16 == 0 for t in (x, *others)):
        strides = [stride for t in (x, *others) for stride in t.stride()[:2]]
        vec = math.gcd(min(table["vec"], 16 // x.element_size()), channels, *strides)
    block_c = table["block_c"]
    while block_c > 32 and -(-channels // block_c) * block_c > 1.07 * channels:  # too many idle threads
        block_c //= 2
    blocks = -(-channels // block_c)
    walks = 32 * table["warps"] * table["vec"] // block_c
    tile = walks * table["steps"]
    tiles = batch * blocks * -(-length // tile)
    loops = max(1, min(table["loops"], tiles // (table["per_sm"] * sm_count(x.device))))
    stages = table["stages"] if seq_idx is None else 1  # loads of documents do not go through shared memory
    constants = {"VEC": vec, "BLOCK_C": block_c, "WALKS": walks, "STEPS": table["steps"], "STAGES": stages}
    constants |= {"num_warps": table["warps"], "maxnreg": table.get("maxnreg")}
    return constants, loops, -(-length // (tile * loops)), blocks


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root  # fewer instructions than a division, which checks for overflow


@triton.jit
def _place(length, loops, C: tl.constexpr, BLOCK_C: tl.constexpr, WALKS: tl.constexpr, STEPS: tl.constexpr):
    """A program's sequence, its place in it, its channels (1, BLOCK_C), those that exist, and each walk's first token
    (WALKS, 1)."""
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c = (pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    programs = tl.cdiv(length, WALKS * STEPS * loops)
    place = pid // blocks % programs
    t = (place * WALKS + tl.arange(0, WALKS))[:, None] * (STEPS * loops)
    return (pid // blocks // programs).to(tl.int64), place, c, c < C if C % BLOCK_C else c >= 0, t


@triton.jit
def _parameter_rows(weight, bias, c, in_c, W: tl.constexpr):
    """The taps and the bias, (1, BLOCK_C) each."""
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * W + k, mask=in_c, other=0.0).to(tl.float32),)
    if bias is None:
        return taps, 0.0
    else:
        return taps, tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)


@triton.jit
def _document(seq_idx, t, length):
    """Document of token t; before the first token it is that of the first."""
    return tl.load(seq_idx + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _previous(x, t, initial, seq_idx, length, in_c, X_ROW: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before token t (x points there), oldest first, without those of other documents than t - 1's;
    and the document of t - 1."""
    previous = ()
    document = 0
    for k in tl.static_range(W - 1):
        at = t + (k - W + 1)
        value = tl.load(x + (k - W + 1) * X_ROW, mask=(at >= 0) & (at < length) & in_c, other=0.0)
        if initial is not None:
            value = tl.where(at < 0, tl.load(initial + t + k, mask=(at < 0) & in_c, other=0.0).to(value.dtype), value)
        if seq_idx is not None:
            before = document
            document = _document(seq_idx, at, length)
            previous = _kept(previous, document == before)
        previous += (value.to(tl.float32),)
    return previous, document


@triton.jit
def _kept(previous, same):
    """The previous inputs if `same`, else zeros."""
    kept = ()
    for k in tl.static_range(len(previous)):
        kept += (tl.where(same, previous[k], 0.0),)
    return kept


@triton.jit
def _convolved(value, previous, taps, bias, W: tl.constexpr):
    y = value * taps[W - 1] + bias
    for k in tl.static_range(W - 1):
        y += previous[k] * taps[k]
    return y


@triton.jit(do_not_specialize=["length", "loops", "x_batch", "y_batch", "seq_batch"])
def _forward_kernel(
    x, weight, bias, seq_idx, initial, y,
    length, loops, x_batch, y_batch, seq_batch,
    X_ROW: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr, WALKS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, _, c, in_c, t = _place(length, loops, C, BLOCK_C, WALKS, STEPS)
    x += b * x_batch * VEC + t.to(tl.int64) * X_ROW + c
    y += b * y_batch * VEC + t.to(tl.int64) * C + c
    if seq_idx is not None:
        seq_idx += b * seq_batch
    if initial is not None:
        initial += b * (C * (W - 1)) + c * (W - 1)
    taps, bias_row = _parameter_rows(weight, bias, c, in_c, W)
    previous, document = _previous(x, t, initial, seq_idx, length, in_c, X_ROW, W)
    for begin in tl.range(0, loops * STEPS, STEPS, num_stages=STAGES):
        rows = ()
        documents = ()
        for i in tl.static_range(STEPS):
            at = t + begin + i
            rows += (tl.load(x + begin * X_ROW + i * X_ROW, mask=(at < length) & in_c, other=0.0),)
            if seq_idx is not None:
                documents += (_document(seq_idx, at, length),)
        for i in tl.static_range(STEPS):
            value = rows[i].to(tl.float32)
            if seq_idx is not None:
                previous = _kept(previous, document == documents[i])
                document = documents[i]
            out = _convolved(value, previous, taps, bias_row, W)
            if SILU:
                out *= sigmoid(out)
            at = t + begin + i
            tl.store(y + begin * C + i * C, out.to(y.dtype.element_ty), mask=(at < length) & in_c)
            if W > 1:
                previous = previous[1:] + (value,)


@triton.jit
def _backward_step(
    value, d, here, previous, ahead, same, sums, taps, bias,
    W: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Token t of the backward walk, with input `value` and gradient d.

    here: whether t - 1 is of the same document, None without documents; ahead: what the gradients of inputs t - W + 1
    to t - 1 have received so far; same: for k from 0, whether t - 2 - k is of the document of t - 1; sums: gradients of
    the taps and of the bias.

    Returns the finished gradient of input t - W + 1, and the walk's state for t + 1.
    """
    if here is not None:
        previous = _kept(previous, here)
        if W > 1:
            reach = (here,)
            for k in tl.static_range(W - 2):
                reach += (same[k] & here,)
            same = reach
    if SILU:
        out = _convolved(value, previous, taps, bias, W)
        gate = sigmoid(out)
        out *= gate
        d *= gate + (out - out * gate)
    if SUM:
        added = ()
        for k in tl.static_range(W - 1):
            added += (sums[k] + d * previous[k],)
        sums = added + (sums[W - 1] + d * value, sums[W] + d)
    received = ()
    for k in tl.static_range(W - 1):
        d_k = d if here is None else tl.where(same[W - 2 - k], d, 0.0)
        received += (ahead[k] + d_k * taps[k],)
    received += (d * taps[W - 1],)
    if W > 1:
        previous = previous[1:] + (value,)
    return received[0], previous, received[1:], same, sums


@triton.jit
def _finish(
    x, dy, out, t, first, previous, document, ahead, same, taps, bias, seq_idx, length, in_c,
    X_ROW: tl.constexpr, DY_ROW: tl.constexpr, OUT_ROW: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Walk on for W - 1 tokens from t, to finish and store the gradients of the W - 1 inputs before t, if not before
    input `first`."""
    for i in tl.static_range(W - 1):
        mask = (t + i < length) & in_c
        value = tl.load(x + i * X_ROW, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + i * DY_ROW, mask=mask, other=0.0).to(tl.float32)
        here = None
        if seq_idx is not None:
            before = document
            document = _document(seq_idx, t + i, length)
            here = document == before
        done, previous, ahead, same, _ = _backward_step(
            value, d, here, previous, ahead, same, (), taps, bias, W, SILU, False
        )
        at = t + (i - W + 1)
        mask = (at >= first) & (at < length) & in_c
        tl.store(out + i * OUT_ROW, done.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "loops", "dy_batch", "x_batch", "dx_batch", "seq_batch"])
def _backward_kernel(
    dy, x, weight, bias, seq_idx, initial, dx, dinitial, partial,
    length, loops, dy_batch, x_batch, dx_batch, seq_batch,
    DY_ROW: tl.constexpr, X_ROW: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr, WALKS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, place, c, in_c, t = _place(length, loops, C, BLOCK_C, WALKS, STEPS)
    dy += b * dy_batch * VEC + t.to(tl.int64) * DY_ROW + c
    x += b * x_batch * VEC + t.to(tl.int64) * X_ROW + c
    dx += b * dx_batch * VEC + t.to(tl.int64) * C + c
    if seq_idx is not None:
        seq_idx += b * seq_batch
    if initial is not None:
        initial += b * (C * (W - 1)) + c * (W - 1)
        dinitial += b * (C * (W - 1)) + c * (W - 1) + t * 0
    taps, bias_row = _parameter_rows(weight, bias, c, in_c, W)
    previous, document = _previous(x, t, initial, seq_idx, length, in_c, X_ROW, W)
    ahead = ()
    same = ()
    sums = ()
    for _ in tl.static_range(W - 1):
        ahead += (tl.zeros((WALKS, BLOCK_C), tl.float32),)
        if seq_idx is not None:
            same += (t >= 0,)
    for _ in tl.static_range(W + 1):
        sums += (tl.zeros((WALKS, BLOCK_C), tl.float32),)

    if initial is not None:
        if place == 0:
            _finish(
                x, dy, dinitial, t, tl.where(t == 0, 1 - W, length), previous, document, ahead, same,
                taps, bias_row, seq_idx, length, in_c, X_ROW, DY_ROW, 1, W, SILU,
            )  # fmt: skip
    for begin in tl.range(0, loops * STEPS, STEPS, num_stages=STAGES):
        rows = ()
        gradients = ()
        documents = ()
        for i in tl.static_range(STEPS):
            at = t + begin + i
            mask = (at < length) & in_c
            rows += (tl.load(x + begin * X_ROW + i * X_ROW, mask=mask, other=0.0),)
            gradients += (tl.load(dy + begin * DY_ROW + i * DY_ROW, mask=mask, other=0.0),)
            if seq_idx is not None:
                documents += (_document(seq_idx, at, length),)
        for i in tl.static_range(STEPS):
            here = document == documents[i] if seq_idx is not None else None
            done, previous, ahead, same, sums = _backward_step(
                rows[i].to(tl.float32), gradients[i].to(tl.float32), here,
                previous, ahead, same, sums, taps, bias_row, W, SILU, True,
            )  # fmt: skip
            if seq_idx is not None:
                document = documents[i]
            at = t + (begin + i - W + 1)
            mask = (at >= t) & (at < length) & in_c
            tl.store(dx + (begin + i - W + 1) * C, done.to(dx.dtype.element_ty), mask=mask)

    end = loops * STEPS
    _finish(  # the first tokens of the next walk add to the gradients of the last inputs of this one
        x + end * X_ROW, dy + end * DY_ROW, dx + (end - W + 1) * C, t + end, t, previous, document, ahead, same,
        taps, bias_row, seq_idx, length, in_c, X_ROW, DY_ROW, C, W, SILU,
    )  # fmt: skip
    partial += (b * tl.cdiv(length, WALKS * STEPS * loops) + place) * ((W + 1) * C) + c
    for k in tl.static_range(W + 1):
        tl.store(partial + k * C, tl.sum(sums[k], 0, keep_dims=True), mask=in_c)


@triton.jit(do_not_specialize=["programs"])
def _sum_kernel(
    partial, dweight, dbias, programs, C: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):
    """Sum partial (programs, W + 1, C) for one tap, or for the bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * ((W + 1) * C) + k * C + c[None, :]
        total += tl.load(partial + at, mask=(row < programs)[:, None] & (c < C)[None, :], other=0.0)
    total = tl.sum(total, 0)
    if k < W:
        tl.store(dweight + c * W + k, total.to(dweight.dtype.element_ty), mask=c < C)
    elif dbias is not None:
        tl.store(dbias + c, total.to(dbias.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["x_batch"])
def _step_kernel(
    x, state, weight, bias, y, x_batch, state_batch, state_channel, state_tap,
    C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    state += b * state_batch + c * state_channel
    value = tl.load(x + b * x_batch + c, mask=in_c, other=0.0)
    out = value.to(tl.float32) * tl.load(weight + c * W + (W - 1), mask=in_c, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    window = ()
    for k in tl.static_range(W - 1):
        window += (tl.load(state + k * state_tap, mask=in_c, other=0.0),)
        out += window[k].to(tl.float32) * tl.load(weight + c * W + k, mask=in_c, other=0.0).to(tl.float32)
    if SILU:
        out *= sigmoid(out)
    tl.store(y + b * C + c, out.to(y.dtype.element_ty), mask=in_c)
    if W > 1:
        tl.debug_barrier()  # the inputs move up one place: all are read before any is written
        window = window[1:] + (value.to(state.dtype.element_ty),)
        for k in tl.static_range(W - 1):
            tl.store(state + k * state_tap, window[k], mask=in_c)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _forward(run, x, weight, bias, seq_idx, initial_state, silu):
    training = x.requires_grad
    x, weight, bias, seq_idx, initial_state = _arranged(x, weight, bias, seq_idx, initial_state)
    batch, length, channels = x.shape
    constants, loops, programs, blocks = _parameters(FORWARD, x, (), seq_idx)
    vec = constants["VEC"]
    y = run.like(x)
    run(
        _forward_kernel, (batch * programs * blocks,),
        x, weight, bias, seq_idx, initial_state, y,
        length, loops, x.stride(0) // vec, length * channels // vec, 0 if seq_idx is None else seq_idx.stride(0),
        X_ROW=x.stride(1), C=channels, W=weight.shape[1], SILU=silu, **constants,
    )  # fmt: skip
    if run.dry and training:
        _gradients(run, y, x, weight, bias, seq_idx, initial_state, silu)
    return y


def _gradients(run, dy, x, weight, bias, seq_idx, initial_state, silu):
    dinitial = run.new(0) if initial_state is None else run.like(initial_state)
    x, weight, bias, seq_idx, initial_state = _arranged(x, weight, bias, seq_idx, initial_state)
    dy = _rows(dy)
    batch, length, channels = x.shape
    width = weight.shape[1]
    constants, loops, programs, blocks = _parameters(BACKWARD, x, (dy,), seq_idx)
    vec = constants["VEC"]
    dx = run.like(x)
    partial = run.new(batch * programs, width + 1, channels)
    run(
        _backward_kernel, (batch * programs * blocks,),
        dy, x, weight, bias, seq_idx, initial_state, dx, None if initial_state is None else dinitial, partial,
        length, loops, dy.stride(0) // vec, x.stride(0) // vec, length * channels // vec,
        0 if seq_idx is None else seq_idx.stride(0),
        DY_ROW=dy.stride(1), X_ROW=x.stride(1), C=channels, W=width, SILU=silu, **constants,
    )  # fmt: skip
    dweight, dbias = run.like(weight), run.new(0) if bias is None else run.like(bias)
    run(
        _sum_kernel, (-(-channels // 32), width + 1),
        partial, dweight, None if bias is None else dbias, batch * programs,
        C=channels, W=width, BLOCK_C=32, ROWS=64, num_warps=4,
    )  # fmt: skip
    return dx, dinitial, dweight, dbias


def _step(run, x, conv_state, weight, bias, silu):
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, channels = x.shape
    y = run.like(x)
    run(
        _step_kernel, (batch * -(-channels // STEP["block_c"]),),
        x, conv_state, weight.contiguous(), bias, y, x.stride(0), *conv_state.stride(),
        C=channels, W=weight.shape[1], SILU=silu, BLOCK_C=STEP["block_c"], num_warps=STEP["warps"],
    )  # fmt: skip
    return y


def _arranged(x, weight, bias, seq_idx, initial_state):
    """The arguments in the memory layouts that the kernels read; what does not matter at W = 1 is dropped."""
    if weight.shape[1] == 1:
        seq_idx = initial_state = None
    if seq_idx is not None and seq_idx.stride(1) != 1:
        seq_idx = seq_idx.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    return _rows(x), weight.contiguous(), None if bias is None else bias.contiguous(), seq_idx, initial_state


def _rows(t):
    """t (B, L, C) with contiguous rows, few enough apart for 32-bit offsets along a walk."""
    return t if t.stride(2) == 1 and t.stride(1) < 2**23 else t.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, initial_state, weight and bias (empty for what is None)."""
    return launched(_gradients, dy, x, weight, bias, seq_idx, initial_state, silu)


def _fake_gradients(dy, x, weight, bias, seq_idx, initial_state, silu):
    f32 = {"dtype": torch.float32}
    dinitial = x.new_empty(0, **f32) if initial_state is None else initial_state.new_empty(initial_state.shape)
    dbias = x.new_empty(0, **f32) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), dinitial, weight.new_empty(weight.shape), dbias


causal_conv1d_backward = CustomOp(causal_conv1d_backward, _fake_gradients, **once("causal_conv1d"))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, initial_state: Tensor | None, silu: bool
) -> Tensor:
    """y of the arguments of `conv.causal_conv1d`."""
    return launched(_forward, x, weight, bias, seq_idx, initial_state, silu)


def _fake(x, weight, bias, seq_idx, initial_state, silu):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    _, _, bias, _, initial_state = ctx.saved_tensors
    dx, dinitial, dweight, dbias = causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial, None


causal_conv1d = CustomOp(causal_conv1d, _fake, save=_save, gradients=_backward)


def causal_conv1d_step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """y of `conv.causal_conv1d_step`; moves conv_state on."""
    return launched(_step, x, conv_state, weight, bias, silu)


def _fake_step(x, conv_state, weight, bias, silu):
    return x.new_empty(x.shape)


causal_conv1d_step = CustomOp(causal_conv1d_step, _fake_step, mutates=("conv_state",))
