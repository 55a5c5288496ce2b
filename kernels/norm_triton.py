"""Triton kernels of the gated RMSNorm: forward, and the backward in one pass.

A tile is a few rows of a few groups, reduced along the group. The backward pass recomputes the mean squares, so only
the inputs are saved; a program takes many tiles of the same groups and keeps their gradient of weight in registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import power_of_2, sm_count
from .conv_triton import sigmoid
from .custom_op import CustomOp, once
from .launch import launched

# Launch parameters: elements of a tile per thread and warps (more for a group that needs them), channels that a tile of
# several groups may span. For the backward pass also warps per multiprocessor (what registers leave room for), whether
# a tile is read again after its sums, and how many tiles are loaded ahead (stages - 1).
FORWARD = {"elements": 16, "warps": 4, "span": 512}
BACKWARD = {"elements": 8, "warps": 4, "span": 512, "sm_warps": 20, "reload": False, "stages": 1}
BACKWARD_LARGE = {"elements": 16, "warps": 4, "span": 512, "sm_warps": 20, "reload": True, "stages": 1}  # over 1024


def _parameters(table, tensors, groups):
    """A kernel's constants, and the number of tiles along the rows, for rows (N, C)."""
    rows, channels = tensors[0].shape
    size = channels // groups
    # Row strides are passed in units of VEC elements, so that the compiler knows how far rows are aligned.
    vec = 1
    if all(t.data_ptr() % 16 == 0 for t in tensors):
        vec = math.gcd(16 // min(t.element_size() for t in tensors), size, *(t.stride(0) for t in tensors))
    block = max(power_of_2(size), 8)
    block_g = min(groups & -groups, max(1, table["span"] // block))  # a power of two that divides groups
    warps = min(32, max(table["warps"], block // (32 * table["elements"])))
    block_r = max(1, 32 * warps * table["elements"] // (block_g * block))
    constants = {"SIZE": size, "GROUPS": groups, "VEC": vec, "BLOCK": block, "BLOCK_G": block_g, "BLOCK_R": block_r}
    return constants | {"num_warps": warps, "maxnreg": table.get("maxnreg")}, -(-rows // block_r), table


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _tile(
    pid, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Rows (M, 1) within a tile, channels (M, BLOCK) and whether they exist (1, BLOCK); M = BLOCK_R * BLOCK_G."""
    m = tl.arange(0, BLOCK_R * BLOCK_G)[:, None]
    s = tl.arange(0, BLOCK)[None, :]
    channel = (pid % (GROUPS // BLOCK_G) * BLOCK_G + m % BLOCK_G) * SIZE + s
    return m // BLOCK_G, channel, s < SIZE if SIZE % BLOCK else s >= 0


@triton.jit
def _gated(x, z, row, channel, mask, x_row, z_row, VEC: tl.constexpr, POLICY: tl.constexpr):
    """x, sigmoid(z), silu(z) and x silu(z); without z, four times x."""
    value = tl.load(x + row * x_row * VEC + channel, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if z is None:
        return value, value, value, value
    else:  # without it, the compiler would read on
        gate = tl.load(z + row * z_row * VEC + channel, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
        opened = sigmoid(gate)
        silu = gate * opened
        return value, opened, silu, value * silu


@triton.jit(do_not_specialize=["rows", "x_row", "z_row", "y_row"])
def _forward_kernel(
    x, weight, z, y, rows, x_row, z_row, y_row, eps,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, channel, exists = _tile(pid, SIZE, GROUPS, BLOCK, BLOCK_G, BLOCK_R)
    row += pid // (GROUPS // BLOCK_G) * BLOCK_R
    mask = (row < rows) & exists
    row = row.to(tl.int64)
    _, _, _, gated = _gated(x, z, row, channel, mask, x_row, z_row, VEC, "")
    scale = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(gated * gated, 1, keep_dims=True) / SIZE + eps)
    tl.store(y + row * y_row * VEC + channel, (gated * rstd * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs", "dy_row", "x_row", "z_row", "dx_row"])
def _backward_kernel(
    dy, x, weight, z, dx, dz, partial, rows, programs, dy_row, x_row, z_row, dx_row, eps,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr, RELOAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With h the gated input, n = h rstd and g = dy weight: dweight = sum dy n and dh = rstd (g - n mean(g n))."""
    pid = tl.program_id(0)
    first, channel, exists = _tile(pid, SIZE, GROUPS, BLOCK, BLOCK_G, BLOCK_R)
    scale = tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK_R * BLOCK_G, BLOCK), tl.float32)
    for tile in tl.range(pid // (GROUPS // BLOCK_G), tl.cdiv(rows, BLOCK_R), programs, num_stages=STAGES):
        row = first + tile * BLOCK_R
        mask = (row < rows) & exists
        row = row.to(tl.int64)
        d = tl.load(dy + row * dy_row * VEC + channel, mask=mask, other=0.0).to(tl.float32)
        value, opened, silu, h = _gated(x, z, row, channel, mask, x_row, z_row, VEC, "")
        g = d * scale
        rstd = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / SIZE + eps)
        slope = tl.sum(h * g, 1, keep_dims=True) / SIZE * (rstd * rstd * rstd)
        if RELOAD:  # from the cache, rather than keep all of it in registers during the sums
            d = tl.load(dy + row * dy_row * VEC + channel, mask=mask, other=0.0, eviction_policy="evict_first").to(
                tl.float32
            )
            value, opened, silu, h = _gated(x, z, row, channel, mask, x_row, z_row, VEC, "evict_first")
            g = d * tl.load(weight + channel, mask=exists, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dscale += d * (h * rstd)
        dh = g * rstd - h * slope
        if z is not None:
            dgate = dh * value * (opened + silu * (1.0 - opened))
            tl.store(dz + row * dx_row * VEC + channel, dgate.to(dz.dtype.element_ty), mask=mask)
            dh *= silu
        tl.store(dx + row * dx_row * VEC + channel, dh.to(dx.dtype.element_ty), mask=mask)

    total = tl.sum(tl.reshape(dscale, (BLOCK_R, BLOCK_G * BLOCK)), 0)
    lane = tl.arange(0, BLOCK_G * BLOCK)
    channel = (pid % (GROUPS // BLOCK_G) * BLOCK_G + lane // BLOCK) * SIZE + lane % BLOCK
    partial += (pid // (GROUPS // BLOCK_G)).to(tl.int64) * (GROUPS * SIZE)
    tl.store(partial + channel, total, mask=lane % BLOCK < SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _forward(run, x, weight, z, groups, eps, training):
    """y for rows x and z (N, C)."""
    y = run.like(x)
    constants, tiles, _ = _parameters(FORWARD, [x] if z is None else [x, z], groups)
    vec = constants["VEC"]
    run(
        _forward_kernel, (tiles * (groups // constants["BLOCK_G"]),),
        x, weight.contiguous(), z, y,
        x.shape[0], x.stride(0) // vec, 0 if z is None else z.stride(0) // vec, x.shape[1] // vec, eps,
        **constants,
    )  # fmt: skip
    if run.dry and training:
        _gradients(run, y, x, weight, z, groups, eps)
    return y


def _gradients(run, dy, x, weight, z, groups, eps):
    """dx, dz, and the parts that sum to the gradient of weight, for rows dy, x and z (N, C)."""
    channels = x.shape[1]
    dx, dz = run.like(x), run.new(0) if z is None else run.like(z)
    table = BACKWARD if channels // groups <= 1024 else BACKWARD_LARGE
    constants, tiles, table = _parameters(table, [dy, x] if z is None else [dy, x, z], groups)
    vec = constants["VEC"]
    blocks = groups // constants["BLOCK_G"]
    per_sm = max(1, table["sm_warps"] // constants["num_warps"])
    programs = min(tiles, max(1, per_sm * sm_count(x.device) // blocks))
    partial = run.new(programs, channels)
    run(
        _backward_kernel, (programs * blocks,),
        dy, x, weight.contiguous(), z, dx, None if z is None else dz, partial,
        x.shape[0], programs, dy.stride(0) // vec, x.stride(0) // vec, 0 if z is None else z.stride(0) // vec,
        channels // vec, eps,
        **constants, RELOAD=table["reload"], STAGES=table["stages"],
    )  # fmt: skip
    return dx, dz, partial


def _rows(t):
    """t as rows (N, C) with contiguous channels: a view wherever the strides allow one. None stays None."""
    if t is None:
        return None
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def gated_rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (empty without it) and weight."""
    dx, dz, partial = launched(_gradients, _rows(dy), _rows(x), weight, _rows(z), groups, eps)
    return dx.view(x.shape), dz if z is None else dz.view(z.shape), partial.sum(0).to(weight.dtype)


def _fake_gradients(dy, x, weight, z, groups, eps):
    dz = x.new_empty(0, dtype=torch.float32) if z is None else z.new_empty(z.shape)
    return x.new_empty(x.shape), dz, weight.new_empty(weight.shape)


gated_rms_norm_backward = CustomOp(gated_rms_norm_backward, _fake_gradients, **once("gated_rms_norm"))


def gated_rms_norm(x: Tensor, weight: Tensor, z: Tensor | None, groups: int, eps: float) -> Tensor:
    """y of the arguments of `norm.gated_rms_norm`."""
    return launched(_forward, _rows(x), weight, _rows(z), groups, eps, x.requires_grad).view(x.shape)


def _fake(x, weight, z, groups, eps):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    _, _, z = ctx.saved_tensors
    dx, dz, dweight = gated_rms_norm_backward(dy, *ctx.saved_tensors, ctx.groups, ctx.eps)
    return dx, dweight, None if z is None else dz, None, None


gated_rms_norm = CustomOp(gated_rms_norm, _fake, save=_save, gradients=_backward)
