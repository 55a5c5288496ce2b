"""The Triton kernel of one decoding step of Mamba-1: one launch that reads and writes the state once."""

import triton
import triton.language as tl
from torch import Tensor

from .backend import power_of_2
from .custom_op import CustomOp
from .launch import launched
from .ssd_step_triton import config
from .ssd_triton import softplus


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, dt_bias, y, s_sb, s_sd, x_sb, dt_sb, A_sd, B_sb, B_sg, C_sb, C_sg, d, blocks,
    SB: tl.constexpr, SC: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    i_ok = i < d
    ok = i_ok[:, None] & (n < N)[None, :]
    at = state + b * s_sb + i[:, None] * s_sd + n[None, :]
    old = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    rate = tl.load(A + i[:, None] * A_sd + n[None, :], mask=ok, other=0.0).to(tl.float32)
    B_ = tl.load(B + b * B_sb + (i // SB)[:, None] * B_sg + n[None, :], mask=ok, other=0.0).to(tl.float32)
    C_ = tl.load(C + b * C_sb + (i // SC)[:, None] * C_sg + n[None, :], mask=ok, other=0.0).to(tl.float32)
    x_ = tl.load(x + b * x_sb + i, mask=i_ok, other=0.0).to(tl.float32)
    step = tl.load(dt + b * dt_sb + i, mask=i_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + i, mask=i_ok, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    new = old * tl.exp(step[:, None] * rate) + (x_ * step)[:, None] * B_
    tl.store(at, new.to(state.dtype.element_ty), mask=ok)
    y_ = tl.sum(new * C_, 1)
    if HAS_D:
        y_ += tl.load(D + i, mask=i_ok, other=0.0).to(tl.float32) * x_
    tl.store(y + b * d + i, y_.to(y.dtype.element_ty), mask=i_ok)


def _step(run, state, x, dt, A, B, C, D, dt_bias, dt_softplus):
    batch, d, N = state.shape
    y = run.new(batch, d, dtype=x.dtype)
    options = config(64, N, state.dtype)
    blocks = -(-d // options["BLOCK_P"])
    run(
        _step_kernel, (batch * blocks,),
        state, x, dt, A, B, C, D, dt_bias, y,
        *state.stride()[:2], x.stride(0), dt.stride(0), A.stride(0), *B.stride()[:2], *C.stride()[:2], d, blocks,
        SB=d // B.shape[1], SC=d // C.shape[1], N=N, HAS_D=D is not None, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus, BLOCK_N=power_of_2(N), **options,
    )  # fmt: skip
    return y


def selective_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """See transpoint.kernels.selective; all contiguous in their last dimension."""
    return launched(_step, state, x, dt, A, B, C, D, dt_bias, dt_softplus)


def _fake(state, x, dt, A, B, C, D, dt_bias, dt_softplus):
    return x.new_empty(x.shape)


selective_step = CustomOp(selective_step, _fake, mutates=("state",))
