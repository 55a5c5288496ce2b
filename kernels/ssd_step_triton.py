"""The Triton kernel of one decoding step of Mamba-2: one launch that reads and writes the state once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import power_of_2
from .custom_op import CustomOp
from .launch import launched
from .ssd_triton import softplus


def config(P: int, N: int, dtype: torch.dtype) -> dict:
    """The rows of a state that a program updates, and its warps: the fastest of many on an H200, batch 256."""
    elements, warps = (8192, 4) if dtype == torch.float32 else (1024, 1)
    return {
        "BLOCK_P": min(power_of_2(P), max(1, elements // power_of_2(N))),
        "num_warps": warps,
    }


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, dt_bias, y,
    s_sb, s_sh, s_sp, x_sb, x_sh, dt_sb, dt_sh, B_sb, B_sh, C_sb, C_sh, H,
    SX: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_ok, n_ok = p < P, n < N
    at = state + b * s_sb + h * s_sh + p[:, None] * s_sp + n[None, :]
    ok = p_ok[:, None] & n_ok[None, :]
    old = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    x_ = tl.load(x + b * x_sb + h // SX * x_sh + p, mask=p_ok, other=0.0).to(tl.float32)
    B_ = tl.load(B + b * B_sb + h // SB * B_sh + n, mask=n_ok, other=0.0).to(tl.float32)
    C_ = tl.load(C + b * C_sb + h // SC * C_sh + n, mask=n_ok, other=0.0).to(tl.float32)
    step = tl.load(dt + b * dt_sb + h * dt_sh).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + h).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    new = old * tl.exp(step * tl.load(A + h).to(tl.float32)) + (x_ * step)[:, None] * B_[None, :]
    tl.store(at, new.to(state.dtype.element_ty), mask=ok)
    y_ = tl.sum(new * C_[None, :], 1)
    if HAS_D:
        y_ += tl.load(D + h).to(tl.float32) * x_
    tl.store(y + pid * P + p, y_.to(y.dtype.element_ty), mask=p_ok)


def _step(run, state, x, dt, A, B, C, D, dt_bias, dt_softplus):
    batch, heads = dt.shape
    P, N = x.shape[-1], B.shape[-1]
    y = run.new(batch, heads, P, dtype=x.dtype)
    options = config(P, N, state.dtype)
    run(
        _step_kernel, (batch * heads, -(-P // options["BLOCK_P"])),
        state, x, dt, A, B, C, D, dt_bias, y,
        *state.stride()[:3], *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], heads,
        SX=heads // x.shape[1], SB=heads // B.shape[1], SC=heads // C.shape[1], P=P, N=N, HAS_D=D is not None,
        HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus, BLOCK_N=power_of_2(N), **options,
    )  # fmt: skip
    return y


def ssd_step(
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
    """See transpoint.kernels.ssd; all contiguous in their last dimension."""
    return launched(_step, state, x, dt, A, B, C, D, dt_bias, dt_softplus)


def _fake(state, x, dt, A, B, C, D, dt_bias, dt_softplus):
    return x.new_empty(*dt.shape, x.shape[-1])


ssd_step = CustomOp(ssd_step, _fake, mutates=("state",))
