"""What else can be had for the same work: mamba_ssm, fla-core, liger-kernel, causal-conv1d, and PyTorch.

Each takes a case's inputs, by name, in the order of our op's arguments. What it needs beforehand (expanded heads, other
layouts) it makes outside the call, untimed. Packages are imported when their turn comes: one that is not installed is a
refusal, no error.
"""

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transpoint.kernels import ssd_reference

from .inputs import expand, leaf, randn

Inputs = dict[str, Tensor]


class Call(NamedTuple):
    """One implementation, bound to one set of inputs."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()  # what the backward pass computes gradients of, if not of the case's leaves
    compare: Callable[[Tensor], Tensor] | None = lambda y: y  # output -> what ours returns; None: something else
    env: dict[str, str] = {}  # environment variables set while it runs


def plain(function: Callable[..., Tensor]) -> Callable[[Inputs], Call]:
    """A function that takes the inputs by name."""
    return lambda t: Call(lambda: function(**t))


def mamba_scan(t: Inputs) -> Call:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, B, C = (leaf(v) for v in _mamba_heads(t))
    dt, A, D, bias = (leaf(t[n]) for n in ("dt", "A", "D", "dt_bias"))

    def run():
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)

    return Call(run, (x, dt, A, B, C, D, bias))


def fla_core(t: Inputs) -> Call:
    """The recurrence alone: steps, decays and expanded heads are inputs, and D x is left out."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, *inputs = _fla_inputs(t)
    q, k, v, g = (leaf(value) for value in inputs)
    return Call(
        lambda: chunk_simple_gla(q, k, v, g, scale=1.0)[0],
        (q, k, v, g),
        compare=lambda y: y + t["D"].unsqueeze(-1) * x,
    )


def fla_scan(t: Inputs) -> Call:
    """All that ssd_scan does, around the same recurrence."""
    from fla.ops.simple_gla import chunk_simple_gla

    t = {name: leaf(value) for name, value in t.items()}

    def run():
        x, q, k, v, g = _fla_inputs(t)
        y = chunk_simple_gla(q, k, v, g, scale=1.0)[0]
        return (y + t["D"].unsqueeze(-1) * x).to(x.dtype)

    return Call(run, tuple(t.values()))


def attention(kind: str, t: Inputs) -> Call:
    """Attention over as many tokens and heads, for context. kind: a name of SDPBackend."""
    batch, length, kv, head_dim = t["x"].shape
    heads, backend = t["dt"].shape[-1], getattr(SDPBackend, kind)
    q, k, v = (
        randn((batch, length, n, head_dim), t["x"].device, t["x"].dtype).transpose(1, 2).requires_grad_()
        for n in (heads, kv, kv)
    )

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != heads)

    return Call(run, (q, k, v), compare=None)


def mamba_step(t: Inputs) -> Call:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state, (x, B, C) = t["state"], _mamba_heads(t)
    # One dt, bias and A for a head are told by strides of zero.
    dt, bias, D = (v.unsqueeze(-1).expand(*v.shape, state.shape[2]) for v in (t["dt"], t["dt_bias"], t["D"]))
    A = t["A"][:, None, None].expand(state.shape[1:])
    return Call(lambda: selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True))


def _mamba_heads(t: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """x of all heads; B and C of as many as each other."""
    heads = t["dt"].shape[-1]
    x, B, C = expand(t["x"], heads), t["B"], t["C"]
    return (x, B, C) if B.shape[-2] == C.shape[-2] else (x, expand(B, heads), expand(C, heads))


def _fla_inputs(t: Inputs) -> tuple[Tensor, ...]:
    """x of all heads, and q, k, v, g: the scan as gated linear attention."""
    heads = t["dt"].shape[-1]
    x = expand(t["x"], heads)
    dt = F.softplus(t["dt"].float() + t["dt_bias"])
    return x, expand(t["C"], heads), expand(t["B"], heads), (x * dt.unsqueeze(-1)).to(x.dtype), dt * t["A"]


def fla_delta(t: Inputs) -> Call:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return Call(lambda: chunk_gated_delta_rule(**t, scale=1.0)[0])


def fla_delta_step(t: Inputs) -> Call:
    """It leaves the new state elsewhere, its rows and columns exchanged."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    state = t["state"].mT.contiguous()
    token = {name: value.unsqueeze(1) for name, value in t.items() if name != "state"}
    options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    return Call(lambda: fused_recurrent_gated_delta_rule(**token, **options)[0].squeeze(1))


def mamba_selective(t: Inputs) -> Call:
    """It takes tokens last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt = (leaf(t[name].mT) for name in ("x", "dt"))
    B, C = (leaf(t[name].permute(0, 2, 3, 1)) for name in ("B", "C"))
    A, D, bias = (leaf(t[name]) for name in ("A", "D", "dt_bias"))
    return Call(
        lambda: selective_scan_fn(x, dt, A, B, C, D=D, delta_bias=bias, delta_softplus=True),
        (x, dt, A, B, C, D, bias),
        compare=lambda y: y.mT,
    )


def mamba_selective_step(t: Inputs) -> Call:
    """Its heads are our groups."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    groups = t["B"].shape[1]
    x, dt = (t[name].unflatten(1, (groups, -1)) for name in ("x", "dt"))
    state = t["state"].unflatten(1, (groups, -1))
    A, D, bias = (t[name].unflatten(0, (groups, -1)) for name in ("A", "D", "dt_bias"))
    return Call(
        lambda: selective_state_update(state, x, dt, A, t["B"], t["C"], D=D, dt_bias=bias, dt_softplus=True).flatten(1)
    )


def whole_matrices(t: Inputs) -> Call:
    """Both matrices written out."""
    length, heads, head_dim = t["q"].shape[1:]
    q, k = t["q"].transpose(1, 2), expand(t["k"], heads).transpose(1, 2)
    masked = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)

    def run():
        with torch.no_grad():
            scores = (q @ k.mT).float() * head_dim**-0.5
            attention = scores.masked_fill(masked, -math.inf).softmax(-1)
        matrix = ssd_reference.ssd_matrix(t["dt"], t["A"], t["B"], t["C"], dt_bias=t["dt_bias"])
        return (attention - matrix).square().sum((-2, -1))

    return Call(run)


def fla_conv(t: Inputs, gluon: bool = False) -> Call:
    from fla.modules.causal_conv1d import causal_conv1d

    x, weight, bias = t.values()
    env = {"FLA_CONV_GLUON": "1"} if gluon else {}
    return Call(lambda: causal_conv1d(x, weight, bias, activation="silu", backend="triton")[0], env=env)


def cuda_conv(t: Inputs) -> Call:
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = t.values()
    return Call(lambda: causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT)


def torch_conv(t: Inputs) -> Call:
    x, weight, bias = t.values()
    length, channels, width = x.shape[1], *weight.shape

    def run():
        y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
        return F.silu(y[..., :length]).mT

    return Call(run)


def fla_conv_step(t: Inputs) -> Call:
    from fla.modules.causal_conv1d import causal_conv1d_update

    cache = F.pad(t["conv_state"].contiguous(), (1, 0))  # it keeps one more input, which it does not read
    return Call(lambda: causal_conv1d_update(t["x"], cache, None, t["weight"], t["bias"], activation="silu")[0])


def gated_norm(module: str, groups: int, t: Inputs) -> Call:
    """The same function of mamba_ssm and of fla."""
    rmsnorm_fn = importlib.import_module(module).rmsnorm_fn
    x, weight, z = t.values()
    size = None if groups == 1 else x.shape[-1] // groups
    return Call(lambda: rmsnorm_fn(x, weight, None, z=z, eps=1e-6, group_size=size, norm_before_gate=False))


def fla_kl(t: Inputs, fp32: bool) -> Call:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    hidden, weight, teacher, teacher_weight = t.values()
    return Call(lambda: fused_kl_div_loss(hidden, teacher, weight, teacher_weight, accumulate_grad_in_fp32=fp32))


def liger_jsd(t: Inputs) -> Call:
    """beta = 0 is the forward KL."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    # Then labels, beta, ignore_index, temperature, accumulation.
    options = (None, 0.0, -100, 1.0, torch.float32, None, None)
    return Call(lambda: LigerFusedLinearJSDFunction.apply(*t.values(), *options))


def liger_kl(t: Inputs) -> Call:
    """It wants the teacher's probabilities: the product and softmax that make them are part of the call."""
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

    hidden, weight, teacher, teacher_weight = t.values()
    # Then labels, reduction, ignore_index, temperature, eps, accumulation.
    options = (None, "batchmean", -100, 1.0, 1e-10, torch.float32)

    def run():
        with torch.no_grad():
            target = (teacher @ teacher_weight.mT).softmax(-1)
        return LigerFusedLinearKLDivFunction.apply(hidden, weight, target, *options)

    return Call(run)


def torch_kl(t: Inputs) -> Call:
    hidden, weight, teacher, teacher_weight = t.values()

    def run():
        with torch.no_grad():
            target = (teacher @ teacher_weight.mT).float().log_softmax(-1)
        logits = (hidden @ weight.mT).float()
        return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    return Call(run)


def tame_autotuners():
    """Let peers' autotuners compile their configurations in parallel and time each for 10 ms instead of 100.

    Otherwise mamba_ssm alone would take minutes. What they choose from stays the same.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def prune_configs(self, kwargs):
        self.uncompiled = prune(self, kwargs)
        return self.uncompiled

    def _bench(self, *args, config, **kwargs):
        def compile_one(other):
            # One that does not compile is the autotuner's business, when it comes to it.
            with contextlib.suppress(Exception):
                self.fn.run(*args, **{**kwargs, **other.all_kwargs(), "warmup": True})

        if len(configs := self.__dict__.pop("uncompiled", ())) > 1:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, configs))
        return bench(self, *args, config=config, **kwargs)

    Autotuner.prune_configs, Autotuner._bench = prune_configs, _bench
    Autotuner.do_bench = property(lambda self: self._do_bench or functools.partial(do_bench, warmup=2, rep=10))
