"""The Triton kernel of one decoding step of the gated delta rule: one launch that reads and writes the state once."""

import triton
import triton.language as tl
from torch import Tensor

from .backend import power_of_2
from .custom_op import CustomOp
from .launch import launched
from .ssd_step_triton import config


@triton.jit
def _step_kernel(
    state, q, k, v, g, beta, y,
    s_sb, s_sh, s_sp, q_sb, q_sh, k_sb, k_sh, v_sb, v_sh, g_sb, g_sh, beta_sb, beta_sh, H,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // H, pid % H
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_ok, n_ok = p < P, n < N
    at = state + b * s_sb + h * s_sh + p[:, None] * s_sp + n[None, :]
    ok = p_ok[:, None] & n_ok[None, :]
    old = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    q_ = tl.load(q + b * q_sb + h // SQ * q_sh + n, mask=n_ok, other=0.0).to(tl.float32)
    k_ = tl.load(k + b * k_sb + h // SK * k_sh + n, mask=n_ok, other=0.0).to(tl.float32)
    v_ = tl.load(v + b * v_sb + h // SV * v_sh + p, mask=p_ok, other=0.0).to(tl.float32)
    old *= tl.exp(tl.load(g + b * g_sb + h * g_sh).to(tl.float32))
    change = tl.load(beta + b * beta_sb + h * beta_sh).to(tl.float32) * (v_ - tl.sum(old * k_[None, :], 1))
    new = old + change[:, None] * k_[None, :]
    tl.store(at, new.to(state.dtype.element_ty), mask=ok)
    tl.store(y + pid * P + p, tl.sum(new * q_[None, :], 1).to(y.dtype.element_ty), mask=p_ok)


def _step(run, state, q, k, v, g, beta):
    batch, heads = g.shape
    P, N = v.shape[-1], k.shape[-1]
    y = run.new(batch, heads, P, dtype=v.dtype)
    options = config(P, N, state.dtype)
    run(
        _step_kernel, (batch * heads, -(-P // options["BLOCK_P"])),
        state, q, k, v, g, beta, y,
        *state.stride()[:3], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(), *beta.stride(), heads,
        SQ=heads // q.shape[1], SK=heads // k.shape[1], SV=heads // v.shape[1], P=P, N=N, BLOCK_N=power_of_2(N),
        **options,
    )  # fmt: skip
    return y


def delta_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """See transpoint.kernels.delta; state, q, k and v contiguous in their last dimension."""
    return launched(_step, state, q, k, v, g, beta)


def _fake(state, q, k, v, g, beta):
    return v.new_empty(*g.shape, v.shape[-1])


delta_step = CustomOp(delta_step, _fake, mutates=("state",))
