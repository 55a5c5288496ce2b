"""`linear_kl` on Triton kernels and cuBLAS: two passes over the logits of a chunk, and never one over fp32 logits.

A chunk's tokens go through the head weights a few hundred at a time:

1. `_logits_kernel` makes both models' products hidden @ weight.T a tile at a time. Of a row of a tile it keeps the
   maximum and the sum of exponentials (fp32), and it writes exp(logit - maximum) in 16 bits. Logits themselves would
   lose 0.06 at a magnitude of 16 in bfloat16; these values are right to 2**-9 whatever the magnitude.
2. `_combine_kernel`: joins the tiles' sums into softmax denominators, adds up the loss and overwrites the student's
   values with d loss / d logits.

Then, once per chunk, cuBLAS makes d @ weight and adds d.T @ hidden to the weight gradient in fp32.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from .backend import interpreted, power_of_2, sm_count
from .custom_op import CustomOp, once
from .kl_reference import IGNORED_LABEL
from .launch import launched

# For the values of a chunk (the student's of all its tokens, the teacher's of a part) at least this, and for a large
# weight a share of its gradient in float32: every chunk reads and writes that once.
BUFFER_BYTES = 256 * 10**6
BUFFER_SHARE = 0.75
HALVE_NUMEL = 64 * 2**20  # a larger weight's gradient is rounded in place
IGNORED = tl.constexpr(IGNORED_LABEL)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
# Where a tile's exponential leaves the normal numbers of bfloat16 and float32, its exponent is written in its place:
# a negative number, which no exponential is. The loss then stays right however far apart two models' logits are.
LEAST = tl.constexpr(-120.0)


def default_config(dtype, device):
    """Launch parameters for a compute dtype.

    tile: tokens, vocabulary and hidden units of a tile of the product; programs: for a multiprocessor; group: tiles of
    a row that _combine_kernel takes at a time.
    """
    config = dict(group=8, combine_warps=4, combine_stages=3)
    if dtype == torch.float32:  # without tf32 no tensor cores: the product is what takes time
        return config | dict(tile=(64, 64, 32), warps=8, stages=2, programs=2, flatten=False)
    if not _large_shared_memory(device):
        return config | dict(tile=(64, 128, 64), warps=4, stages=2, programs=1, flatten=False)
    return config | dict(tile=(128, 256, 64), warps=8, stages=3, programs=1, flatten=True)


@functools.cache
def _large_shared_memory(device):
    """Whether blocks may have what data-center GPUs since Hopper give them (interpreted: it does not matter)."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 * 1024


if interpreted():

    @triton.jit
    def _log2(x):
        return tl.log2(tl.where(x > 0, x, 1.0))
else:

    @triton.jit
    def _log2(x):
        return libdevice.fast_log2f(x)  # tl.log2 takes twenty instructions for its last bits


@triton.jit
def _tiles(rows, shared, vocab, M: tl.constexpr, N: tl.constexpr):
    """How many tiles of the product there are."""
    return tl.cdiv(rows, M) * (tl.cdiv(shared, N) + tl.cdiv(vocab - shared, N))


@triton.jit
def _product(
    first_index,
    hidden,
    weight,
    values,
    max_ptr,
    sum_ptr,
    own_sum_ptr,
    hidden_row,
    value_row,
    rows,
    shared,
    vocab,
    dim,
    scale,
    temperature,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EDGE: tl.constexpr,
    OWN_SUM: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """values = 2**(x - maximum of the tile row), x = scale * hidden @ weight.T; also that maximum and the sum.

    This program's tiles are first_index and every num_programs-th after it. No tile holds rows of the weight from both
    sides of `shared`, where the other model's vocabulary ends; EDGE says that some tile is not filled. OWN_SUM asks for
    the sum of 2**(temperature * (x - maximum)), too.
    """
    row_tiles = tl.cdiv(rows, M)
    shared_tiles = tl.cdiv(shared, N)
    tiles = shared_tiles + tl.cdiv(vocab - shared, N)
    steps = tl.cdiv(dim, K)
    tl.assume(steps > 0)
    for index in tl.range(first_index, row_tiles * tiles, tl.num_programs(0), flatten=FLATTEN):
        # Tiles of the same rows of the weight follow one another: each of those is then read from memory once.
        row = (index % row_tiles) * M
        tile = index // row_tiles
        first = tl.where(tile < shared_tiles, tile * N, shared + (tile - shared_tiles) * N)
        end = tl.where(tile < shared_tiles, shared, vocab)
        acc = tl.zeros((M, N), tl.float32)
        for step in range(steps):
            a = hidden.load([hidden_row + row, step * K])
            b = weight.load([first, step * K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if EDGE:
            acc = tl.where((first + tl.arange(0, N) < end)[None, :], acc, -1e30)
        top = tl.max(acc, 1) * scale
        x = acc * scale - top[:, None]
        u = tl.exp2(x)
        total = tl.sum(u, 1)
        values.store([value_row + row, tile * N], tl.where(x < LEAST, x, u).to(values.dtype))
        at = row + tl.arange(0, M)
        kept = at < rows
        at = at.to(tl.int64) * tiles + tile
        tl.store(max_ptr + at, top, kept)
        tl.store(sum_ptr + at, total, kept)
        if OWN_SUM:
            tl.store(own_sum_ptr + at, tl.sum(tl.exp2(x * temperature), 1), kept)


@triton.jit(
    do_not_specialize=["hidden_row", "s_value_row", "rows", "shared", "vocab", "s_dim", "t_dim"],
)
def _logits_kernel(
    s_hidden,
    s_weight,
    s_values,
    s_max_ptr,
    s_sum_ptr,
    s_own_sum_ptr,
    t_hidden,
    t_weight,
    t_values,
    t_max_ptr,
    t_sum_ptr,
    hidden_row,
    s_value_row,
    rows,
    shared,
    vocab,
    s_dim,
    t_dim,
    scale,
    temperature,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EDGE: tl.constexpr,
    OWN_SUM: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both models' values and sums: see _product."""
    program = tl.program_id(0)
    _product(
        program,
        s_hidden,
        s_weight,
        s_values,
        s_max_ptr,
        s_sum_ptr,
        s_own_sum_ptr,
        hidden_row,
        s_value_row,
        rows,
        shared,
        vocab,
        s_dim,
        scale,
        temperature,
        M,
        N,
        K,
        EDGE,
        OWN_SUM,
        FLATTEN,
        PRECISION,
    )
    # The teacher's tiles go on where the student's left off, so that no program has two tiles more than another.
    done = _tiles(rows, shared, vocab, M, N) % tl.num_programs(0)
    _product(
        (program + tl.num_programs(0) - done) % tl.num_programs(0),
        t_hidden,
        t_weight,
        t_values,
        t_max_ptr,
        t_sum_ptr,
        None,
        hidden_row,
        0,
        rows,
        shared,
        shared,
        t_dim,
        scale,
        temperature,
        M,
        N,
        K,
        EDGE,
        False,
        FLATTEN,
        PRECISION,
    )


@triton.jit
def _log_sum(max_ptr, sum_ptr, tiles, factor, TILES: tl.constexpr):
    """log2 of the sum over tiles of sum * 2**(factor * max)."""
    tile = tl.arange(0, TILES)
    top = tl.load(max_ptr + tile, tile < tiles, float("-inf")) * factor
    part = tl.load(sum_ptr + tile, tile < tiles, 0.0)
    most = tl.max(top, 0)
    return _log2(tl.sum(part * tl.exp2(top - most), 0)) + most


@triton.jit
def _load(ptr, max_ptr, log_sum, tile, tiles, N: tl.constexpr):
    """A few tiles of one row: probabilities, and their logarithms to base 2."""
    here = tile < tiles
    value = tl.load(ptr + tile[:, None] * N + tl.arange(0, N)[None, :], here[:, None], 0.0).to(tl.float32)
    shift = (tl.load(max_ptr + tile, here, 0.0) - log_sum)[:, None]
    factor = tl.where(here[:, None], tl.exp2(shift), 0.0)
    return tl.maximum(value, 0.0) * factor, tl.where(value > 0, _log2(value), value) + shift


@triton.jit
def _terms(s, s_log, t, t_log, beta, DIVERGENCE: tl.constexpr):
    """Terms of the divergence less its sum(s * g), and g: its gradient in the student's logits is s * (g - that)."""
    if DIVERGENCE == "forward":
        return t * (t_log - s_log), t
    elif DIVERGENCE == "reverse":
        return tl.zeros_like(s), s_log - t_log
    else:
        m = beta * t + (1 - beta) * s
        m_log = _log2(tl.where(m > 0, m, 1.0))
        g = tl.where(s > 0, s_log - m_log, 0.0) * (1 - beta)
        return beta * tl.where(t > 0, t * (t_log - m_log), 0.0), g


@triton.jit(
    do_not_specialize=["rows", "s_tiles", "t_tiles", "shared", "vocab"],
    do_not_specialize_on_alignment=["mask_ptr", "label_ptr", "divergence_ptr", "ce_ptr"],
)
def _combine_kernel(
    s_ptr,
    d_ptr,
    t_ptr,
    s_max_ptr,
    s_sum_ptr,
    s_own_sum_ptr,
    t_max_ptr,
    t_sum_ptr,
    mask_ptr,
    label_ptr,
    scalar_ptr,
    divergence_ptr,
    ce_ptr,
    rows,
    s_tiles,
    t_tiles,
    shared,
    vocab,
    temperature,
    beta,
    DIVERGENCE: tl.constexpr,
    MASK: tl.constexpr,
    LABELS: tl.constexpr,
    OWN_SUM: tl.constexpr,
    GRAD: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Each token's divergence and cross-entropy, and the gradient in its logits written over the student's values.

    The gradient is in units of temperature / tokens (see _count_kernel). d_ptr is the memory of s_ptr in the dtype of
    the products to come.
    """
    PASSES: tl.constexpr = 1 if DIVERGENCE == "forward" else 2  # the second once sum(s * g) of _terms is known
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_tiles * N
    d_row = d_ptr + row * s_tiles * N
    t_row = t_ptr + row * t_tiles * N
    s_max_row = s_max_ptr + row * s_tiles
    t_max_row = t_max_ptr + row * t_tiles
    counts = True
    if MASK:
        counts = tl.load(mask_ptr + row) != 0
    divergence = 0.0
    ce = 0.0
    if counts:
        s_log_sum = _log_sum(s_max_row, s_sum_ptr + row * s_tiles, t_tiles, 1.0, TILES)
        t_log_sum = _log_sum(t_max_row, t_sum_ptr + row * t_tiles, t_tiles, 1.0, TILES)
        ce_scale = 0.0
        label_at = -1
        own_log_sum = s_log_sum
        if LABELS:
            if OWN_SUM:
                own_log_sum = _log_sum(s_max_row, s_own_sum_ptr + row * s_tiles, s_tiles, temperature, TILES)
            label = tl.load(label_ptr + row)
            if label != IGNORED:
                ce_scale = tl.load(scalar_ptr + 1)
                if (label >= 0) & (label < vocab):
                    label_at = tl.where(label < shared, label, label - shared + t_tiles * N).to(tl.int32)
                    value = tl.load(s_row + label_at).to(tl.float32)
                    log = tl.where(value > 0, _log2(value), value) + tl.load(s_max_row + label_at // N)
                    ce = LN2 * (own_log_sum - log * temperature)
                else:
                    ce = float("nan")
            tl.debug_barrier()  # the label's value is read before any thread writes over it

        acc = tl.zeros((GROUP, N), tl.float32)
        s_acc = tl.zeros((GROUP, N), tl.float32)
        sg_acc = tl.zeros((GROUP, N), tl.float32)
        mean = 0.0
        for number in tl.static_range(PASSES):
            groups = tl.cdiv(s_tiles, GROUP)
            for group in tl.range(0, groups, num_stages=STAGES):
                # From the end: what the products wrote last may still be in the L2 cache.
                tile = (groups - 1 - group) * GROUP + tl.arange(0, GROUP)
                s, s_log = _load(s_row, s_max_row, s_log_sum, tile, s_tiles, N)
                t, t_log = _load(t_row, t_max_row, t_log_sum, tile, t_tiles, N)
                own = s
                if OWN_SUM:
                    own = tl.exp2((s_log + s_log_sum) * temperature - own_log_sum)
                    s = tl.where((tile < t_tiles)[:, None], s, 0.0)
                term, g = _terms(s, s_log, t, t_log, beta, DIVERGENCE)
                if number == 0:
                    acc += term
                    if PASSES == 2:
                        s_acc += s
                        sg_acc += s * g
                if GRAD and number == PASSES - 1:
                    if DIVERGENCE == "forward":
                        d = s - t
                    else:
                        d = LN2 * s * (g - mean)
                    at = tile[:, None] * N + tl.arange(0, N)[None, :]
                    if LABELS:
                        d += ce_scale * tl.where(at == label_at, own - 1, own)
                    tl.store(d_row + at, d.to(d_ptr.dtype.element_ty), (tile < s_tiles)[:, None])
            if number == 0:
                divergence = LN2 * tl.sum(tl.sum(acc, 1), 0)
                if PASSES == 2:
                    # The sum of s is 1 up to its rounding, which this keeps out of the gradient and the loss.
                    mean = tl.sum(tl.sum(sg_acc, 1), 0) / tl.sum(tl.sum(s_acc, 1), 0)
                    divergence += LN2 * mean
    elif GRAD:
        for start in range(0, s_tiles, GROUP):
            tile = start + tl.arange(0, GROUP)
            at = tile[:, None] * N + tl.arange(0, N)[None, :]
            tl.store(d_row + at, tl.zeros((GROUP, N), d_ptr.dtype.element_ty), (tile < s_tiles)[:, None])
    tl.store(divergence_ptr + row, divergence)
    if LABELS:
        tl.store(ce_ptr + row, ce)


@triton.jit(do_not_specialize=["tokens"])
def _count_kernel(
    mask_ptr,
    label_ptr,
    scalar_ptr,
    tokens,
    temperature,
    ce_weight,
    MASK: tl.constexpr,
    LABELS: tl.constexpr,
    CE_OVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scalars: unit of the gradients in memory, cross-entropy's weight in it; 1 / tokens, 1 / what CE_OVER counts."""
    token_acc = tl.zeros((BLOCK,), tl.int32)
    ce_acc = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = at < tokens
        if MASK:
            kept = kept & (tl.load(mask_ptr + at, kept, 0) != 0)
        token_acc += kept.to(tl.int32)
        if LABELS and CE_OVER == "labels":
            kept = tl.load(label_ptr + at, kept, IGNORED) != IGNORED
        ce_acc += kept.to(tl.int32)
    count = tl.maximum(tl.sum(token_acc, 0), 1).to(tl.float32)
    ce_count = tl.maximum(tl.sum(ce_acc, 0), 1).to(tl.float32)
    tl.store(scalar_ptr, temperature / count)
    tl.store(scalar_ptr + 1, ce_weight * count / (ce_count * temperature))
    tl.store(scalar_ptr + 2, 1 / count)
    tl.store(scalar_ptr + 3, 1 / ce_count)


@triton.jit
def _scale_kernel(x, factor, out, numel, BLOCK: tl.constexpr):
    """out = factor * x, in the dtype of out. (PyTorch's own product of two dtypes reads an element at a time.)"""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < numel).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), at < numel)


@triton.jit(do_not_specialize=["tokens"])
def _finish_kernel(
    divergence_ptr,
    ce_ptr,
    scalar_ptr,
    loss_ptr,
    parts_ptr,
    tokens,
    temperature,
    ce_weight,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss and parts from the sums over tokens."""
    acc = tl.zeros((BLOCK,), tl.float32)
    ce_acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tokens, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(divergence_ptr + at, at < tokens, 0.0)
        if LABELS:
            ce_acc += tl.load(ce_ptr + at, at < tokens, 0.0)
    divergence = tl.sum(acc, 0) * temperature * temperature * tl.load(scalar_ptr + 2)
    ce = tl.sum(ce_acc, 0) * tl.load(scalar_ptr + 3)
    tl.store(parts_ptr, divergence)
    tl.store(parts_ptr + 1, ce)
    loss = divergence
    if LABELS:
        loss += ce_weight * ce
    tl.store(loss_ptr, loss)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _kl(
    run, s_hidden, s_weight, t_hidden, t_weight, mask, labels, s_dtype, t_dtype, divergence, beta, temperature,
    ce_weight, ce_over, chunk_size, hidden_grad, weight_grad,
):  # fmt: skip
    tokens = len(s_hidden)
    shared = min(len(s_weight), len(t_weight))
    vocab = len(s_weight) if labels is not None else shared
    own_sum = labels is not None and (vocab > shared or temperature != 1)
    grad = hidden_grad or weight_grad
    config = default_config(torch.promote_types(s_dtype, t_dtype), s_hidden.device)

    loss, terms, scalars = run.new(), run.new(2), run.new(4)
    d_hidden = run.new(*s_hidden.shape if hidden_grad else (0,), dtype=_grad_dtype(s_hidden))
    if not tokens:
        d_weight = run.new(*s_weight.shape if weight_grad else (0,), dtype=_grad_dtype(s_weight))
        return loss.zero_(), terms.zero_(), d_hidden, d_weight.zero_()
    total = _WeightGradient(s_weight, vocab) if weight_grad and not run.dry else None
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
        if weight_grad:  # a NaN in a masked token's hidden state times its gradient of zero would be one
            s_hidden = torch.where(mask[:, None] != 0, s_hidden, 0)
    if labels is not None:
        labels = labels.contiguous()
    given = dict(MASK=mask is not None, LABELS=labels is not None)
    run(
        _count_kernel,
        (1,),
        mask,
        labels,
        scalars,
        tokens,
        temperature,
        ce_weight,
        **given,
        CE_OVER=ce_over,
        BLOCK=4096,
        num_warps=16,
    )

    student = _Model(s_hidden, s_weight[:vocab], s_dtype, shared, config)
    teacher = _Model(t_hidden, t_weight[:shared], t_dtype, shared, config)
    part, chunk = _plan(tokens, student.row_bytes, 4 * s_weight.numel() if weight_grad else 0, chunk_size, config)
    m, n, k = config["tile"]
    # The other divergences take two passes over a row, and registers for two sums more.
    group = config["group"] if divergence == "forward" else max(1, config["group"] // 2)
    student.allocate(run, chunk if grad else part, part, own_sum)
    teacher.allocate(run, part, part, False)
    divergences = run.new(tokens)
    ces = run.new(tokens) if labels is not None else None

    def products(at, row, rows):
        programs = config["programs"] * sm_count(s_hidden.device)
        run(
            _logits_kernel,
            (min(programs, -(-rows // m) * (student.tiles + teacher.tiles)),),
            *student.descriptors,
            *student.sums,
            *teacher.descriptors,
            *teacher.sums[:2],
            at,
            row,
            rows,
            shared,
            vocab,
            student.hidden.shape[1],
            teacher.hidden.shape[1],
            LOG2E / temperature,
            temperature,
            M=m,
            N=n,
            K=k,
            EDGE=bool(shared % n or vocab % n),
            OWN_SUM=own_sum,
            FLATTEN=config["flatten"],
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=config["warps"],
            num_stages=config["stages"],
        )

    def combine(at, row, rows):
        values = student.values[row:]
        run(
            _combine_kernel,
            (rows,),
            values,
            values.view(s_dtype),
            teacher.values,
            *student.sums,
            *teacher.sums[:2],
            None if mask is None else mask[at:],
            None if labels is None else labels[at:],
            scalars,
            divergences[at:],
            None if labels is None else ces[at:],
            rows,
            student.tiles,
            teacher.tiles,
            shared,
            vocab,
            temperature,
            beta,
            DIVERGENCE=divergence,
            **given,
            OWN_SUM=own_sum,
            GRAD=grad,
            N=n,
            GROUP=group,
            TILES=power_of_2(student.tiles),
            STAGES=config["combine_stages"],
            num_warps=config["combine_warps"],
        )

    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        for at in range(start, end, part):
            where = at, at - start if grad else 0, min(part, end - at)
            products(*where)
            combine(*where)
        if run.dry:
            continue
        d = student.values.view(s_dtype)[: end - start]
        if hidden_grad:
            products_of_blocks = [_matmul(d[:, columns], student.weight[rows]) for columns, rows in student.blocks]
            _scale(functools.reduce(torch.add, products_of_blocks), scalars[0], d_hidden[start:end])
        if weight_grad:
            for columns, rows in student.blocks:
                total.add(rows.start, d[:, columns].mT, student.hidden[start:end])
    d = None
    student.values = teacher.values = None  # their memory is enough for what comes
    student.descriptors = teacher.descriptors = None
    run(
        _finish_kernel,
        (1,),
        divergences,
        ces,
        scalars,
        loss,
        terms,
        tokens,
        temperature,
        ce_weight,
        LABELS=labels is not None,
        BLOCK=4096,
        num_warps=16,
    )
    d_weight = run.new(0, dtype=_grad_dtype(s_weight)) if total is None else total.finish(scalars[0])
    return loss, terms, d_hidden, d_weight


class _Model:
    """One side's operands, and its buffers: the values and sums of _logits_kernel."""

    def __init__(self, hidden, weight, dtype, shared, config):
        self.hidden, self.weight = _operand(hidden, dtype), _operand(weight, dtype)
        self.tile = m, n, k = config["tile"]
        vocab = len(weight)
        self.tiles = -(-shared // n) + -(-(vocab - shared) // n)
        # Which columns of the values belong to which rows of the weight.
        after = -(-shared // n) * n
        self.blocks = [(slice(0, shared), slice(0, shared))]
        if vocab > shared:
            self.blocks.append((slice(after, after + vocab - shared), slice(shared, vocab)))
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self.row_bytes = self.tiles * n * self.dtype.itemsize

    def allocate(self, run, rows, part, own_sum):
        m, n, k = self.tile
        self.values = run.new(rows, self.tiles * n, dtype=self.dtype)
        sums = run.new(3 if own_sum else 2, part, self.tiles)
        self.sums = [*sums, None][:3]
        self.descriptors = [
            TensorDescriptor.from_tensor(self.hidden, [m, k]),
            TensorDescriptor.from_tensor(self.weight, [n, k]),
            TensorDescriptor.from_tensor(self.values, [m, n]),
        ]


def _plan(tokens, row_bytes, gradient_bytes, chunk_size, config):
    """Tokens in a part, of which both models' values are kept, and in a chunk, of which the student's are."""
    rows = max(BUFFER_BYTES, int(BUFFER_SHARE * gradient_bytes)) // row_bytes
    part = config.get("part") or max(128, 1 << max(1, rows // 3).bit_length() - 1)
    chunk = chunk_size or config.get("chunk") or max(1, rows // part - 1) * part
    if not chunk_size:  # chunks of about one length
        chunk = -(-tokens // -(-tokens // chunk) // part) * part
    chunk = min(chunk, tokens)
    return min(part, chunk), chunk


class _WeightGradient:
    """A sum of products in float32, which `finish` rounds to bfloat16 if the weight is.

    A large one is held in two halves: `finish` writes the result into the first one's memory and so takes no more.
    """

    def __init__(self, weight, vocab):
        rows, dim = weight.shape
        self.shape, self.dtype = weight.shape, _grad_dtype(weight)
        self.half = -(-rows // 2) if self.dtype == torch.bfloat16 and weight.numel() > HALVE_NUMEL else rows
        halves = self.half, rows - self.half
        self.parts = [torch.empty(n, dim, dtype=torch.float32, device=weight.device) for n in halves]
        self.begun = set()
        for _, part in self._pieces(vocab, rows - vocab):
            part.zero_()

    def _pieces(self, row, count):
        """The memory of these rows: (row, part of a half) pairs."""
        for start, part in zip((0, self.half), self.parts, strict=True):
            first, last = max(row, start), min(row + count, start + len(part))
            if first < last:
                yield first, part[first - start : last - start]

    def add(self, row, a, b):
        """Add a @ b from this row on."""
        for at, part in self._pieces(row, len(a)):
            piece = a[at - row : at - row + len(part)]
            beta = 1 if at in self.begun else 0
            self.begun.add(at)
            if piece.is_cuda and piece.dtype != torch.float32:
                if _adds_in_float32(piece.device):
                    torch.addmm(part, piece, b, out_dtype=torch.float32, beta=beta, out=part)
                else:
                    product = torch.mm(piece, b, out_dtype=torch.float32)
                    part.add_(product) if beta else part.copy_(product)
            else:
                torch.addmm(part, piece.float(), b.float(), beta=beta, out=part)

    def finish(self, scale):
        first, second = self.parts
        if self.dtype == torch.float32:
            return first.mul_(scale)
        if not len(second):
            return _scale(first, scale, torch.empty_like(first, dtype=self.dtype))
        # bfloat16 rows a to 2 a lie where the float32 rows a / 2 to a were: doubling a from a start that goes through
        # other memory, nothing is written over before it was read.
        result = torch.empty(0, dtype=self.dtype, device=first.device)
        result.set_(first.untyped_storage(), 0, self.shape, (self.shape[1], 1))
        start = min(HALVE_NUMEL // 4 // self.shape[1] + 1, self.half)
        result[:start] = first[:start] * scale
        while start < self.half:
            end = min(2 * start, self.half)
            _scale(first[start:end], scale, result[start:end])
            start = end
        _scale(second, scale, result[self.half :])
        return result


def _scale(x, factor, out):
    """out = factor * x, both contiguous, factor a tensor of one number. Returns out."""
    return launched(_scale_launch, x, factor, out)


def _scale_launch(run, x, factor, out):
    run(_scale_kernel, (-(-x.numel() // 4096),), x, factor, out, x.numel(), BLOCK=4096, num_warps=8)
    return out


def _grad_dtype(tensor):
    """What a gradient is kept in until the backward pass: float16 could underflow or overflow before the loss scale."""
    return torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32


def _operand(tensor, dtype):
    """The tensor as the copy engine takes it: rows of contiguous elements at multiples of 16 bytes."""
    tensor = tensor.to(dtype)
    row, column = tensor.stride()
    if column != 1 or row < tensor.shape[1] or row * dtype.itemsize % 16 or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _matmul(a, b):
    """a @ b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@functools.cache
def _adds_in_float32(device):
    """Whether torch.addmm takes a float32 sum beside half-precision operands (PyTorch 2.10)."""
    a, total = (
        torch.zeros(16, 16, dtype=torch.bfloat16, device=device),
        torch.zeros(16, 16, dtype=torch.float32, device=device),
    )
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def linear_kl_backward(d_loss: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that the forward pass kept, times that of the loss, in the dtype of its input."""
    return _scale(grad, d_loss, torch.empty_like(grad, dtype=dtype))


def _fake_gradient(d_loss, grad, dtype):
    return torch.empty_like(grad, dtype=dtype)


linear_kl_backward = CustomOp(linear_kl_backward, _fake_gradient, **once("linear_kl"))


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    divergence: str,
    beta: float,
    temperature: float,
    ce_weight: float,
    ce_over: str,
    chunk_size: int,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its two parts, and its gradients in student_hidden and student_weight (empty where not asked for).

    The arguments of `transpoint.kernels.kl.linear_kl` with tokens in one dimension, a bool mask, the dtypes that each
    model's product is computed in, and chunk_size 0 for the default.
    """
    return launched(
        _kl, student_hidden, student_weight, teacher_hidden, teacher_weight, mask, labels, student_dtype, teacher_dtype,
        divergence, beta, temperature, ce_weight, ce_over, chunk_size, hidden_grad, weight_grad, record=False,
    )  # fmt: skip


def _fake(student_hidden, student_weight, *args):
    hidden_grad, weight_grad = args[-2:]
    loss = student_hidden.new_empty((), dtype=torch.float32)
    return (
        loss,
        loss.new_empty(2),
        student_hidden.new_empty(student_hidden.shape if hidden_grad else 0, dtype=_grad_dtype(student_hidden)),
        student_weight.new_empty(student_weight.shape if weight_grad else 0, dtype=_grad_dtype(student_weight)),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else zeros are made for the kept gradients, as large as the head
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[-2:]


def _backward(ctx, d_loss, *_):
    grads = [
        linear_kl_backward(d_loss, grad, dtype) if wanted else None
        for grad, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *grads, *[None] * 14


linear_kl = CustomOp(linear_kl, _fake, save=_save, gradients=_backward)
