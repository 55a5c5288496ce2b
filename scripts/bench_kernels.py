"""Time `transpoint.kernels` and every installed peer in one process, and check ours against float64 first.

    python scripts/bench_kernels.py                    # all rows; writes docs/results/kernels-<gpu>.json and the table
    python scripts/bench_kernels.py --only 'ssd_scan'  # some rows, printed only
    python scripts/bench_kernels.py --table            # the table in docs/results/kernels.md again, from the JSON
    python scripts/bench_kernels.py --quick --device cpu   # tiny shapes: does the script run?

Peers are whatever can be imported of mamba_ssm, fla-core, liger-kernel and causal-conv1d, PyTorch's attention, and
plain PyTorch. What a peer cannot do is reported as a refusal with its reason; it never ends the run.

How it is measured: random bfloat16 inputs, several sets in turn where one would fit in the L2 cache; the median over
samples after warm-up, timed with CUDA events. "graph" replays a captured CUDA graph; "eager" launches from Python, call
after call, without waiting in between. The floor is the larger of bytes / copy rate and operations / matmul rate, both
rates measured in the same run. Memory is what one call allocates at its peak, outputs and gradients included.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
OURS = "transpoint"
FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
TOLERANCE = 1e-2  # relative L2 error of bfloat16 work against float64
PEER_TOLERANCE = 5e-2  # a peer further from the reference computes something else, and is no measure
SCAN_TILE = 64  # tokens: the smallest chunk that fills Hopper's matrix unit
PACKAGES = ("mamba-ssm", "fla-core", "liger-kernel", "causal-conv1d", "triton", "torch")
CONTEXT = ("attention",)  # implementations whose name starts so compute something else: shown, never the best peer


class Call(NamedTuple):
    """One implementation, bound to one set of inputs."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...] = ()  # what the backward pass computes gradients of
    compare: Callable[[Tensor], Tensor] | None = lambda y: y  # output -> what ours returns; None: something else
    env: dict[str, str] = {}  # environment variables set while it runs


@dataclass
class Case:
    """One op at one shape."""

    op: str
    shape: str
    make: Callable[[], dict[str, Tensor]]  # fresh random inputs
    ours: Callable[[dict], Tensor]
    reference: Callable[[dict], Tensor]  # on float64 copies of the inputs
    peers: dict[str, Callable[[dict], Call]]
    costs: dict[str, tuple[float, float]]  # pass -> bytes, floating-point operations
    targets: dict[str, list[dict]] = field(default_factory=dict)  # pass -> see `judge`
    leaves: tuple[str, ...] = ()  # inputs with gradients
    sliced: tuple[str, ...] = ()  # inputs that `cut` cuts
    cut: Callable[[Tensor], Tensor] = lambda t: t  # the slice of inputs and output that the reference computes
    mutated: tuple[str, ...] = ()  # inputs that a call changes

    @property
    def name(self):
        return f"{self.op} {self.shape}"


# Floors: bytes with each input read once and each output written once (twice for an input of both passes), and the
# operations that the matrix unit must do. Small tensors (per head, per channel) are left out.


def scan_cost(batch, length, heads, head_dim, state, x_heads, b_heads, c_heads, size=2):
    """SSD scan: pass -> (bytes, operations), by the chunked algorithm with chunks of SCAN_TILE tokens."""
    tokens = batch * length
    y, x = tokens * heads * head_dim, tokens * x_heads * head_dim
    inputs = x + tokens * (b_heads + c_heads) * state + tokens * heads
    moved = {FORWARD: inputs + y, BOTH: inputs + y + inputs + y + inputs}

    tile = 2 * SCAN_TILE
    step = 2 * state * head_dim  # of one token and head: into the state, or out of it
    scores = tokens * max(b_heads, c_heads) * tile * state  # C B^T, or one of its gradients
    forward = scores + tokens * heads * (tile * head_dim + 2 * step)
    backward = 3 * scores + tokens * heads * (2 * tile * head_dim + 4 * step)
    return {FORWARD: (size * moved[FORWARD], forward), BOTH: (size * moved[BOTH], forward + backward)}


def step_cost(batch, heads, head_dim, state, x_heads, b_heads, c_heads, state_size, size=2):
    """One decoding step: the state is read and written."""
    small = heads * head_dim + x_heads * head_dim + (b_heads + c_heads) * state + heads
    return {STEP: (batch * (2 * state_size * heads * head_dim * state + size * small), 0)}


def elementwise_cost(numel, inputs, size=2):
    """y = f(inputs), all of one shape; backward reads inputs and dy and writes the gradients of the inputs."""
    return {FORWARD: (size * numel * (inputs + 1), 0), BOTH: (size * numel * (3 * inputs + 2), 0)}


def distance_cost(batch, length, heads, head_dim, state, kv, size=2):
    """Matching of mixing matrices, forward and backward: both matrices are made twice, their lower halves only."""
    entries = batch * heads * length**2 / 2
    reads = batch * length * (heads + kv) * (head_dim + state) + batch * length * heads
    writes = batch * length * ((heads + kv) * state + heads)
    return {BOTH: (size * (2 * reads + writes), 2 * entries * (2 * (head_dim + state) + 2 * state))}


def kl_cost(tokens, student, teacher, vocab, size=2):
    """KL from hidden states: two products for the logits and two for the student's gradients."""
    moved = 2 * (tokens + vocab) * student + (tokens + vocab) * teacher
    return {BOTH: (size * moved, 2 * tokens * vocab * (3 * student + teacher))}


def floor_ms(cost, ceilings):
    """Milliseconds under which no implementation can run, from (bytes, operations) and the measured rates."""
    return 1e3 * max(cost[0] / ceilings["bytes_per_s"], cost[1] / ceilings["flop_per_s"])


# Cases.


@functools.cache
def generator(kind):
    """Our own, of the current device: a capture that fails leaves PyTorch's default generator unusable."""
    return torch.Generator(kind).manual_seed(0)


def randn(shape, device, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, device=device, generator=generator(device.type)) * scale).to(dtype)


class Maker:
    """Builds cases on one device."""

    def __init__(self, device, dtype=torch.bfloat16):
        self.device, self.dtype = torch.device(device), dtype
        # Ours must be the kernels on a GPU, not a silent fall-back.
        self.backend = {"backend": "triton"} if self.device.type == "cuda" else {}

    def randn(self, *shape, dtype=None, scale=1.0):
        return randn(shape, self.device, dtype or self.dtype, scale)

    def uniform(self, low, high, *shape):
        return torch.empty(shape, device=self.device).uniform_(low, high, generator=generator(self.device.type))

    def steps(self, *shape):
        """dt, dt_bias and A as in a Mamba-2 layer: steps of about 0.001 to 0.1, decay rates of 1 to 16."""
        heads = shape[-1]
        step = self.uniform(math.log(1e-3), math.log(1e-1), heads).exp()
        return {
            "dt": self.randn(*shape, scale=0.5),
            "dt_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
            "A": -self.uniform(1, 16, heads),
            "D": self.randn(heads, dtype=torch.float32),
        }

    def scan(
        self, batch, length, heads, head_dim, state, *, kv=None, groups=None, targets=None, attention=2, plain=False
    ):
        """ssd_scan. kv: heads of x and B. groups: heads of B and C. attention: how many kinds of it for context."""
        from transpoint.kernels import ssd, ssd_reference

        x_heads, b_heads, c_heads = kv or heads, kv or groups or heads, groups or heads

        def make():
            return {
                "x": self.randn(batch, length, x_heads, head_dim),
                "B": self.randn(batch, length, b_heads, state),
                "C": self.randn(batch, length, c_heads, state),
                **self.steps(batch, length, heads),
            }

        def call(function, t, **options):
            return function(t["x"], t["dt"], t["A"], t["B"], t["C"], D=t["D"], dt_bias=t["dt_bias"], **options)

        def attend(kind, t):
            from torch.nn.attention import SDPBackend, sdpa_kernel

            q, k, v = (
                self.randn(batch, length, h, head_dim).transpose(1, 2).requires_grad_()
                for h in (heads, x_heads, x_heads)
            )
            kind = getattr(SDPBackend, kind)

            def run():
                with sdpa_kernel(kind):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=x_heads != heads)

            return Call(run, (q, k, v), compare=None)

        leaves = ("x", "dt", "A", "B", "C", "D", "dt_bias")
        peers = {"mamba_ssm": mamba_scan, "fla core": fla_core, "fla": fla_scan}
        if plain:
            peers["PyTorch"] = lambda t: Call(lambda: call(ssd_reference.ssd_scan, t), tuple(t[n] for n in leaves))
        if attention:
            peers["attention, cuDNN"] = functools.partial(attend, "CUDNN_ATTENTION")
        if attention > 1:
            peers["attention, flash"] = functools.partial(attend, "FLASH_ATTENTION")
        checked = min(length, 2048)  # tokens of the last sequence; later ones cannot change earlier outputs
        shape = f"{batch},{length},{heads},{head_dim},{state}"
        shape += f", kv {kv}" if kv else f", groups {b_heads}"
        return Case(
            op="ssd_scan",
            shape=shape,
            make=make,
            ours=lambda t: call(ssd.ssd_scan, t, **self.backend),
            reference=lambda t: call(ssd_reference.ssd_scan, t),
            peers=peers,
            costs=scan_cost(batch, length, heads, head_dim, state, x_heads, b_heads, c_heads),
            targets=targets or {},
            leaves=leaves,
            sliced=("x", "dt", "B", "C"),
            cut=lambda t: t[-1:, :checked],
        )

    def step(self, batch, heads, head_dim, state, *, kv=None, groups=None, state_dtype=torch.float32, targets=None):
        """ssd_step, which updates the state in place."""
        from transpoint.kernels import ssd, ssd_reference

        x_heads, b_heads, c_heads = kv or heads, kv or groups or heads, groups or heads

        def make():
            return {
                "state": self.randn(batch, heads, head_dim, state, dtype=state_dtype),
                "x": self.randn(batch, x_heads, head_dim),
                "B": self.randn(batch, b_heads, state),
                "C": self.randn(batch, c_heads, state),
                **self.steps(batch, heads),
            }

        def call(function, t, **options):
            named = (t[n] for n in ("state", "x", "dt", "A", "B", "C"))
            return function(*named, D=t["D"], dt_bias=t["dt_bias"], **options)

        kind = "fp32" if state_dtype == torch.float32 else "bf16"
        heads_text = f"kv {kv}" if kv else f"groups {b_heads}"
        return Case(
            op="ssd_step",
            shape=f"{batch},{heads},{head_dim},{state}, {heads_text}, {kind} state",
            make=make,
            ours=lambda t: call(ssd.ssd_step, t, **self.backend),
            reference=lambda t: call(ssd_reference.ssd_step, t),
            peers={"mamba_ssm": mamba_step, "PyTorch": lambda t: Call(lambda: call(ssd_reference.ssd_step, t))},
            costs=step_cost(batch, heads, head_dim, state, x_heads, b_heads, c_heads, state_dtype.itemsize),
            targets=targets or {},
            sliced=("state", "x", "dt", "B", "C"),
            cut=lambda t: t[-16:],
            mutated=("state",),
        )

    def distance(self, batch, length, heads, head_dim, state, kv):
        """mixing_distance; k and B have `kv` heads."""
        from transpoint.kernels import matching, matching_reference, ssd_reference

        def make():
            inputs = self.steps(batch, length, heads)
            del inputs["D"]
            return {
                "q": self.randn(batch, length, heads, head_dim),
                "k": self.randn(batch, length, kv, head_dim),
                "B": self.randn(batch, length, kv, state, scale=state**-0.25),
                "C": self.randn(batch, length, heads, state, scale=state**-0.25),
                **inputs,
            }

        def whole(t):
            q, k = t["q"].transpose(1, 2), expand(t["k"], heads).transpose(1, 2)
            masked = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)

            def run():
                with torch.no_grad():
                    scores = (q @ k.mT).float() * head_dim**-0.5
                    attention = scores.masked_fill(masked, -math.inf).softmax(-1)
                matrix = ssd_reference.ssd_matrix(t["dt"], t["A"], t["B"], t["C"], dt_bias=t["dt_bias"])
                return (attention - matrix).square().sum((-2, -1))

            return Call(run, tuple(t[n] for n in leaves))

        leaves = ("dt", "A", "B", "C", "dt_bias")
        return Case(
            op="mixing_distance",
            shape=f"{batch},{length},{heads},{head_dim},{state}, kv {kv}",
            make=make,
            ours=lambda t: matching.mixing_distance(**t, **self.backend),
            reference=lambda t: matching_reference.mixing_distance(**t),
            peers={"PyTorch": whole},
            costs=distance_cost(batch, length, heads, head_dim, state, kv),
            leaves=leaves,
            sliced=("q", "k", "dt", "B", "C"),
            cut=lambda t: t[-1:],
        )

    def conv(self, batch, length, channels, width=4, *, targets=None):
        from transpoint.kernels import conv, conv_reference

        def make():
            return {
                "x": self.randn(batch, length, channels),
                "weight": self.randn(channels, width, scale=0.5),
                "bias": self.randn(channels, scale=0.1),
            }

        def call(function, t, **options):
            return function(t["x"], t["weight"], t["bias"], activation="silu", **options)

        leaves = ("x", "weight", "bias")
        checked = min(length, 2048)
        return Case(
            op="causal_conv1d",
            shape=f"{batch},{length},{channels}, width {width}",
            make=make,
            ours=lambda t: call(conv.causal_conv1d, t, **self.backend),
            reference=lambda t: call(conv_reference.causal_conv1d, t),
            peers={
                "fla": fla_conv,
                "fla, Gluon": functools.partial(fla_conv, env={"FLA_CONV_GLUON": "1"}),
                "causal-conv1d": cuda_conv,
                "PyTorch": torch_conv,
            },
            costs=elementwise_cost(batch * length * channels, inputs=1),
            targets=targets or {},
            leaves=leaves,
            sliced=("x",),
            cut=lambda t: t[-1:, :checked],
        )

    def conv_step(self, batch, channels, width=4):
        """causal_conv1d_step, which updates the last inputs in place."""
        from transpoint.kernels import conv, conv_reference

        def make():
            return {
                "x": self.randn(batch, channels),
                "conv_state": self.randn(batch, width - 1, channels).mT,  # as causal_conv1d leaves it
                "weight": self.randn(channels, width, scale=0.5),
                "bias": self.randn(channels, scale=0.1),
            }

        return Case(
            op="causal_conv1d_step",
            shape=f"{batch},{channels}, width {width}",
            make=make,
            ours=lambda t: conv.causal_conv1d_step(**t, activation="silu", **self.backend),
            reference=lambda t: conv_reference.causal_conv1d_step(**t, activation="silu"),
            peers={
                "fla": fla_conv_step,
                "PyTorch": lambda t: Call(lambda: conv_reference.causal_conv1d_step(**t, activation="silu")),
            },
            costs={STEP: (2 * batch * channels * 2 * width, 0)},
            sliced=("x", "conv_state"),
            cut=lambda t: t[-16:],
            mutated=("conv_state",),
        )

    def norm(self, tokens, channels, groups=1, *, targets=None):
        from transpoint.kernels import norm, norm_reference

        def make():
            return {
                "x": self.randn(tokens, channels),
                "z": self.randn(tokens, channels),
                "weight": self.randn(channels, scale=0.1) + 1,
            }

        def call(function, t, **options):
            return function(t["x"], t["weight"], t["z"], groups=groups, **options)

        leaves = ("x", "weight", "z")
        return Case(
            op="gated_rms_norm",
            shape=f"{tokens},{channels}, groups {groups}",
            make=make,
            ours=lambda t: call(norm.gated_rms_norm, t, **self.backend),
            reference=lambda t: call(norm_reference.gated_rms_norm, t),
            peers={
                "mamba_ssm": functools.partial(peer_norm, "mamba_ssm.ops.triton.layernorm_gated", groups),
                "fla": functools.partial(peer_norm, "fla.modules.norm.layernorm_gated", groups),
                "PyTorch": lambda t: Call(lambda: call(norm_reference.gated_rms_norm, t), tuple(t[n] for n in leaves)),
            },
            costs=elementwise_cost(tokens * channels, inputs=2),
            targets=targets or {},
            leaves=leaves,
            sliced=("x", "z"),
            cut=lambda t: t[-4096:],
        )

    def kl(self, tokens, hidden, vocab, *, targets=None):
        from transpoint.kernels import kl, kl_reference

        def make():
            scale = 2 / math.sqrt(hidden)  # logits of standard deviation 2
            return {
                "student_hidden": self.randn(tokens, hidden),
                "student_weight": self.randn(vocab, hidden, scale=scale),
                "teacher_hidden": self.randn(tokens, hidden),
                "teacher_weight": self.randn(vocab, hidden, scale=scale),
            }

        return Case(
            op="linear_kl",
            shape=f"{tokens}, {hidden}x{vocab}",
            make=make,
            ours=lambda t: kl.linear_kl(**t, **self.backend),
            reference=lambda t: kl_reference.linear_kl(**t),
            peers={
                "fla, bf16 sums": functools.partial(fla_kl, fp32=False),
                "fla, fp32 sums": functools.partial(fla_kl, fp32=True),
                "Liger JSD": liger_jsd,
                "Liger KL": liger_kl,
                "PyTorch": torch_kl,
            },
            costs=kl_cost(tokens, hidden, hidden, vocab),
            targets=targets or {},
            leaves=("student_hidden", "student_weight"),
        )

    def quick(self):
        """Tiny shapes, every op."""
        return [
            self.scan(2, 96, 4, 16, 16, kv=2, plain=True),
            self.scan(1, 64, 4, 16, 32, groups=1, attention=1),
            self.step(4, 4, 16, 32, groups=1),
            self.step(4, 4, 16, 16, kv=2, state_dtype=torch.bfloat16),
            self.conv(2, 70, 48),
            self.conv_step(4, 48),
            self.norm(64, 96, groups=3),
            self.kl(48, 32, 200),
            self.distance(2, 80, 4, 16, 16, kv=2),
        ]

    def full(self):
        """The rows of docs/results/kernels.md, the most important first."""

        def peer(times, of="mamba_ssm", modes=("graph",)):
            return [{"of": of, "times": times, "mode": mode} for mode in modes]

        attention = peer(1, "attention, cuDNN")
        return [
            self.scan(
                *(8, 4096, 32, 64, 64),
                targets={FORWARD: peer(3) + peer(1, "fla core"), BOTH: peer(4) + attention},
                plain=True,
            ),
            self.scan(8, 4096, 32, 64, 128, groups=1, targets={FORWARD: peer(2.5), BOTH: peer(2.5)}),
            self.scan(8, 2048, 9, 64, 64, kv=3, targets={BOTH: peer(4, modes=("graph", "eager"))}, plain=True),
            self.kl(8192, 576, 49152, targets={BOTH: [{"of": "floor", "within": 1.4}, {"of": "memory", "mb": 400}]}),
            self.step(256, 32, 64, 128, groups=1, targets={STEP: [{"of": "floor", "within": 1.15}]}),
            self.step(
                *(256, 32, 64, 128),
                groups=1,
                state_dtype=torch.bfloat16,
                targets={STEP: [{"of": "floor", "within": 1.3}]},
            ),
            self.conv(8, 4096, 2304, targets={BOTH: [{"of": "floor", "within": 1.6}]}),
            self.scan(2, 16384, 32, 64, 128, groups=1, targets={BOTH: peer(2.5)}),
            self.scan(1, 65536, 32, 64, 128, groups=8, targets={BOTH: peer(2.5)}, attention=1),
            self.kl(
                8192, 2048, 128256, targets={BOTH: [{"of": "floor", "within": 1.25}, {"of": "memory", "mb": 1300}]}
            ),
            self.norm(32768, 2048),
            self.norm(16384, 576, groups=9),
            self.conv(8, 2048, 960),
            self.distance(8, 2048, 9, 64, 64, kv=3),
            self.step(64, 32, 64, 128, groups=1),
            self.step(256, 9, 64, 64, kv=3),
            self.conv_step(256, 2304),
            self.distance(2, 4096, 32, 64, 64, kv=8),
        ]


# Peers. Each takes a case's inputs; what it needs beforehand (expanded heads, other layouts) it makes here, untimed.


def expand(t, heads, dim=2):
    return t.repeat_interleave(heads // t.shape[dim], dim) if t.shape[dim] != heads else t


def leaf(t):
    return t.detach().contiguous().requires_grad_()


def mamba_scan(t):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads = t["dt"].shape[-1]
    x, B, C = t["x"], t["B"], t["C"]
    if B.shape[2] != C.shape[2]:
        B, C = expand(B, heads), expand(C, heads)
    x, B, C = leaf(expand(x, heads)), leaf(B), leaf(C)
    dt, A, D, bias = (leaf(t[n]) for n in ("dt", "A", "D", "dt_bias"))

    def run():
        return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)

    return Call(run, (x, dt, A, B, C, D, bias))


def fla_core(t):
    """The recurrence alone: steps, decays and expanded heads are inputs, and D x is left out."""
    from fla.ops.simple_gla import chunk_simple_gla

    heads = t["dt"].shape[-1]
    x = expand(t["x"], heads)
    dt = F.softplus(t["dt"].float() + t["dt_bias"]).detach()
    q, k = leaf(expand(t["C"], heads)), leaf(expand(t["B"], heads))
    v, g = leaf((x * dt.unsqueeze(-1)).to(x.dtype)), leaf(dt * t["A"])
    return Call(
        lambda: chunk_simple_gla(q, k, v, g, scale=1.0)[0],
        (q, k, v, g),
        compare=lambda y: y + t["D"].unsqueeze(-1) * x,
    )


def fla_scan(t):
    """All that ssd_scan does, around the same recurrence."""
    from fla.ops.simple_gla import chunk_simple_gla

    t = {name: leaf(value) for name, value in t.items()}
    heads = t["dt"].shape[-1]

    def run():
        x = expand(t["x"], heads)
        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        v, g = (x * dt.unsqueeze(-1)).to(x.dtype), dt * t["A"]
        y = chunk_simple_gla(expand(t["C"], heads), expand(t["B"], heads), v, g, scale=1.0)[0]
        return (y + t["D"].unsqueeze(-1) * x).to(x.dtype)

    return Call(run, tuple(t.values()))


def mamba_step(t):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state = t["state"]
    heads, head_dim = state.shape[1:3]
    x, B, C = expand(t["x"], heads, 1), t["B"], t["C"]
    if B.shape[1] != C.shape[1]:
        B, C = expand(B, heads, 1), expand(C, heads, 1)
    # One dt, bias and A for a head are told by strides of zero.
    dt, bias, D = (v.unsqueeze(-1).expand(*v.shape, head_dim) for v in (t["dt"], t["dt_bias"], t["D"]))
    A = t["A"][:, None, None].expand(state.shape[1:])
    return Call(lambda: selective_state_update(state, x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True))


def fla_conv(t, env=None):
    from fla.modules.causal_conv1d import causal_conv1d

    x, weight, bias = leaves = tuple(t[n] for n in ("x", "weight", "bias"))
    return Call(lambda: causal_conv1d(x, weight, bias, activation="silu", backend="triton")[0], leaves, env=env or {})


def cuda_conv(t):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias = leaves = tuple(t[n] for n in ("x", "weight", "bias"))
    return Call(lambda: causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT, leaves)


def torch_conv(t):
    x, weight, bias = leaves = tuple(t[n] for n in ("x", "weight", "bias"))
    length, channels, width = x.shape[1], *weight.shape

    def run():
        y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
        return F.silu(y[..., :length]).mT

    return Call(run, leaves)


def fla_conv_step(t):
    from fla.modules.causal_conv1d import causal_conv1d_update

    cache = F.pad(t["conv_state"].contiguous(), (1, 0))  # it keeps one more input, which it does not read
    return Call(lambda: causal_conv1d_update(t["x"], cache, None, t["weight"], t["bias"], activation="silu")[0])


def peer_norm(module, groups, t):
    rmsnorm_fn = importlib.import_module(module).rmsnorm_fn
    x, weight, z = leaves = tuple(t[n] for n in ("x", "weight", "z"))
    size = None if groups == 1 else x.shape[-1] // groups
    return Call(lambda: rmsnorm_fn(x, weight, None, z=z, eps=1e-6, group_size=size, norm_before_gate=False), leaves)


def kl_inputs(t):
    return tuple(t[n] for n in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"))


def fla_kl(t, fp32):
    from fla.modules.fused_kl_div import fused_kl_div_loss

    hidden, weight, teacher, teacher_weight = kl_inputs(t)

    def run():
        return fused_kl_div_loss(hidden, teacher, weight, teacher_weight, accumulate_grad_in_fp32=fp32)

    return Call(run, (hidden, weight))


def liger_jsd(t):
    """beta = 0 is the forward KL."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def run():
        # hidden and weight of both; then labels, beta, ignore_index, temperature, accumulation
        return LigerFusedLinearJSDFunction.apply(*kl_inputs(t), None, 0.0, -100, 1.0, torch.float32, None, None)

    return Call(run, kl_inputs(t)[:2])


def liger_kl(t):
    """It wants the teacher's probabilities: the product and softmax that make them are part of the call."""
    from liger_kernel.ops.fused_linear_kl_div import LigerFusedLinearKLDivFunction

    hidden, weight, teacher, teacher_weight = kl_inputs(t)

    def run():
        with torch.no_grad():
            target = (teacher @ teacher_weight.mT).softmax(-1)
        # then labels, reduction, ignore_index, temperature, eps, accumulation
        return LigerFusedLinearKLDivFunction.apply(
            hidden, weight, target, None, "batchmean", -100, 1.0, 1e-10, torch.float32
        )

    return Call(run, (hidden, weight))


def torch_kl(t):
    hidden, weight, teacher, teacher_weight = kl_inputs(t)

    def run():
        with torch.no_grad():
            target = (teacher @ teacher_weight.mT).float().log_softmax(-1)
        logits = (hidden @ weight.mT).float()
        return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)

    return Call(run, (hidden, weight))


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


# Measuring.


class Step:
    """One call of an implementation: forward, or forward and backward."""

    def __init__(self, call, backward):
        self.call, self.backward, self.dy = call, backward, None

    def __call__(self):
        if not self.backward:
            with torch.no_grad():
                return self.call.run()
        y = self.call.run()
        if self.dy is None and y.dim():
            self.dy = randn(y.shape, y.device, y.dtype)
        return torch.autograd.grad(y, self.call.leaves, self.dy)


class Meter:
    """Times steps on a GPU with events, or on the CPU with a clock."""

    def __init__(self, device, patience_ms):
        self.device, self.patience = torch.device(device), patience_ms
        self.cuda = self.device.type == "cuda"
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 0

    def sync(self):
        if self.cuda:
            torch.cuda.synchronize()

    def elapsed(self, work):
        """Milliseconds of one call of `work`."""
        self.sync()
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def median(self, work, count):
        """Median milliseconds of one of `count` calls inside `work`, and the relative spread between quartiles."""
        once = max(self.elapsed(work), 1e-3)  # also a warm-up
        samples = min(30, max(3, math.ceil(self.patience / once)))
        return middle([self.elapsed(work) / count for _ in range(samples)])

    def sets(self, inputs):
        """How many sets of such inputs it takes to overflow the L2 cache twice."""
        size = sum(t.nbytes for t in inputs.values())
        return min(8, max(1, math.ceil(2 * self.l2 / size)))

    def eager(self, steps, samples):
        """Steady-state time of a call, launched from Python: a function that takes a sample of it, in milliseconds."""
        for step in steps:
            step()
        once = self.elapsed(steps[0])
        count = len(steps) * max(1, round(5 / (once * len(steps) + 1e-3)))
        count = min(max(count, 4), 64)  # more than one: before the first kernel of a sample the GPU waits for Python

        def work():
            for i in range(count):
                steps[i % len(steps)]()

        def sample():
            if len(samples) < 3 or sum(samples) * count < 10 * self.patience:
                samples.append(self.elapsed(work) / count)

        return sample

    def graph(self, steps, estimate_ms, samples):
        """Time of a call replayed as part of a CUDA graph of about a millisecond: a function that takes a sample."""
        torch.cuda.set_sync_debug_mode("error")  # a call that waits for the GPU cannot be captured: find out before
        try:
            steps[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count = len(steps) * min(8, max(1, round(1 / (estimate_ms * len(steps)))))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # autograd's first use of a stream must not be in a capture
            for step in steps:
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.sync()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool):
                for i in range(count):
                    steps[i % len(steps)]()
        except Exception:
            with contextlib.suppress(Exception):  # or the allocator stays in capture
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        graph.replay()

        def sample():
            if len(samples) < 3 or sum(samples) * count < self.patience:
                graph.replay()  # once before it is timed: others ran since
                samples.append(self.elapsed(graph.replay) / count)

        return sample

    def peak_mb(self, step):
        """What a call allocates at its peak beyond its inputs, in 10^6 bytes."""
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = step()
        self.sync()
        del out
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def kernels(self, step):
        """Microseconds that a call spends in each GPU kernel, and how often, in the order of their first launch."""
        self.sync()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            self.sync()
        spent = {}
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                count, total = spent.get(event.name, (0, 0.0))
                spent[event.name] = count + 1, total + event.device_time_total
        return [[name, count, total] for name, (count, total) in spent.items()]

    def free(self):
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def poison(self):
        """Fill memory that calls get next with NaN, so that an element nobody wrote shows."""
        if self.cuda:
            large = [torch.full((2**28,), math.nan, device=self.device) for _ in range(4)]
            small = [torch.full((2**17,), math.nan, device=self.device) for _ in range(128)]
            del large, small

    def ceilings(self):
        """The rates that floors are counted with: a large copy, read and written, and a large bfloat16 product."""
        size, side, dtype = (2**32, 8192, torch.bfloat16) if self.cuda else (2**24, 256, torch.float32)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy_ms, _ = self.median(lambda: target.copy_(source), 1)
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        matmul_ms, _ = self.median(lambda: (a @ b, a @ b, a @ b, a @ b), 4)
        return {"bytes_per_s": 2e3 * size / copy_ms, "flop_per_s": 2e3 * side**3 / matmul_ms}


def middle(times):
    """The median, and the spread between quartiles relative to it."""
    times, count = sorted(times), len(times)
    return times[count // 2], (times[3 * count // 4] - times[count // 4]) / times[count // 2]


def relative(out, ref):
    """Relative L2 error; NaN stays NaN."""
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()


def check(case, inputs, meter):
    """Relative L2 errors of our outputs and gradients at the timed shape, on the slice that the reference computes.

    The gradient of the output is zero outside the slice. So the reference, which sees the slice alone, must find the
    same gradients, and ours must be zero outside.

    Returns:
        The errors by name, the reference's output, and the seconds of our first call, compilation included.
    """
    copies = {name: t.detach().clone() for name, t in inputs.items()}
    slices = {n: (case.cut(t) if n in case.sliced else t).double() for n, t in copies.items()}
    for name in case.leaves:
        copies[name].requires_grad_()
        slices[name] = slices[name].detach().requires_grad_()
    meter.poison()
    start = time.perf_counter()
    y = case.ours(copies)
    dy = torch.zeros_like(y)
    case.cut(dy).copy_(randn(case.cut(dy).shape, dy.device))
    grads = torch.autograd.grad(y, [copies[n] for n in case.leaves], dy) if case.leaves else ()
    meter.sync()
    seconds = time.perf_counter() - start

    y_ref = case.reference(slices)
    errors = {"y": relative(case.cut(y), y_ref) if torch.isfinite(y).all() else math.nan}
    errors.update({name: relative(case.cut(copies[name]), slices[name]) for name in case.mutated})
    grads_ref = torch.autograd.grad(y_ref, [slices[n] for n in case.leaves], case.cut(dy).double()) if grads else ()
    for name, grad, ref in zip(case.leaves, grads, grads_ref, strict=True):
        if name in case.sliced:
            outside = grad.clone()
            case.cut(outside).zero_()
            errors["d" + name] = math.hypot(relative(case.cut(grad), ref), (outside.norm() / ref.norm()).item())
        else:
            errors["d" + name] = relative(grad, ref)
    return errors, y_ref.detach(), seconds


def short(error):
    """One line of an exception, for a table."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].replace("|", "/")
    return text if len(text) <= 120 else text[:117] + "..."


def measure(bind, sets, backward, meter, compare=None):
    """Run one implementation, and capture it in a graph.

    Args:
        bind: inputs -> Call.
        sets: sets of inputs, used in turn.
        compare: Call -> relative error, or None.

    Returns:
        A result: first_call_s, error and peak_mb, as far as they could be had; `refuses` says why it does not run at
        all, `graph_refuses` why not in a graph. Its steps, empty if it refuses. And what takes a sample of its graph's
        time, with the list that it goes to, or None.
    """
    result, steps, graph = {}, [], None
    try:
        calls = [bind(inputs) for inputs in sets]
        with environment(calls[0].env):
            start = time.perf_counter()
            if compare and calls[0].compare:
                result["error"] = compare(calls[0])
            steps = [Step(call, backward) for call in calls]
            steps[0]()
            meter.sync()
            result["first_call_s"] = time.perf_counter() - start
            if meter.cuda:
                result["peak_mb"] = meter.peak_mb(steps[0])
                try:
                    samples = []
                    graph = meter.graph(steps, meter.elapsed(steps[0]), samples), samples
                except Exception as error:
                    result["graph_refuses"] = short(error)
            return result, steps, graph
    except ModuleNotFoundError as error:
        result["refuses"] = f"not installed ({error.name})"
    except Exception as error:
        result["refuses"] = short(error)
    return result, [], None


def measure_in_turn(results, takers, mode, rounds):
    """Add the median time in `mode` and its spread to the results of all implementations, sampled in turn.

    Clocks change with what the GPU did before, and a time from Python is as noisy as the machine is busy: what is
    compared has to meet the same of both.

    Args:
        takers: by implementation, a function that takes a sample, the list it goes to, and its environment.
    """
    for _ in range(rounds):
        for sample, _, env in takers.values():
            with environment(env):
                sample()
    for kind, (_, times, _) in takers.items():
        results[kind][f"{mode}_ms"], results[kind][f"{mode}_spread"] = middle(times)


@contextlib.contextmanager
def environment(variables):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_case(case, meter, ceilings, peers=".*"):
    """Check and time one case: ours and the peers whose names match. What fails is reported, ours too.

    Returns:
        A record for each of its passes.
    """
    records = {
        name: {
            "op": case.op,
            "shape": case.shape,
            "pass": name,
            "bytes": cost[0],
            "flops": cost[1],
            "floor_ms": floor_ms(cost, ceilings),
            "errors": {},
            "targets": case.targets.get(name, []),
            "results": {},
        }
        for name, cost in case.costs.items()
    }
    inputs = case.make()
    expected, first_call = None, None
    start = time.perf_counter()
    try:
        errors, expected, first_call = check(case, inputs, meter)
        say(f"  check {time.perf_counter() - start:.1f} s: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
        for name, record in records.items():
            record["errors"] = errors if name != FORWARD else {"y": errors["y"]}
    except Exception as error:
        say(f"  check failed: {short(error)}")
        for record in records.values():
            record["errors"] = {"check": short(error)}
    meter.free()

    def bind(t):
        return Call(lambda: case.ours(t), tuple(t[n] for n in case.leaves))

    def compare(call):
        y = case.cut(call.compare(call.run()))  # before other calls have changed the inputs
        return relative(y, expected)

    sets = [inputs] + [case.make() for _ in range(meter.sets(inputs) - 1)]
    for name in case.leaves:
        for tensors in sets:
            tensors[name].requires_grad_()
    for name, record in records.items():
        chosen = {kind: bound for kind, bound in case.peers.items() if re.fullmatch(peers, kind)}
        steps, graphs, eager = {}, {}, {}
        for kind, bound in {OURS: bind, **chosen}.items():
            fresh = [{**t, **{n: t[n].clone() for n in case.mutated}} for t in sets]
            known = expected is not None and kind != OURS
            result, steps[kind], graph = measure(bound, fresh, name == BOTH, meter, compare if known else None)
            if kind == OURS and first_call is not None:
                result["first_call_s"] = first_call  # the check was the first
            if kind == OURS and meter.cuda and steps[kind]:
                result["kernels"] = meter.kernels(steps[kind][0])
            record["results"][kind] = result
            if graph:
                graphs[kind] = (*graph, {})
            meter.sync()  # a broken device shows here, and ends the run
            meter.free()
        measure_in_turn(record["results"], graphs, "graph", 30)
        graphs.clear()  # and the memory that they hold
        meter.free()
        for kind, own in steps.items():
            if own:
                samples, env = [], own[0].call.env
                with environment(env):
                    eager[kind] = meter.eager(own, samples), samples, env
        measure_in_turn(record["results"], eager, "eager", 10)
        for kind, result in record["results"].items():
            say(f"  {name:16s} {kind:18s} " + describe(result))
    return list(records.values())


def describe(result):
    if "refuses" in result:
        return "refuses: " + result["refuses"]
    parts = []
    if "graph_ms" in result:
        parts.append(f"graph {result['graph_ms']:8.3f} ms ±{100 * result['graph_spread']:.0f}%")
    elif "graph_refuses" in result:
        parts.append("graph refuses: " + result["graph_refuses"])
    parts.append(f"eager {result['eager_ms']:8.3f} ms ±{100 * result['eager_spread']:.0f}%")
    if "peak_mb" in result:
        parts.append(f"{result['peak_mb']:6.0f} MB")
    parts.append(f"first call {result['first_call_s']:.1f} s")
    if "error" in result:
        parts.append(f"error {result['error']:.1e}")
    return "  ".join(parts)


def say(text):
    print(text, flush=True)


# The table.


def best_peer(record, mode="graph"):
    """Name and milliseconds of the fastest peer that does the same work; where it refuses graphs, its eager time."""
    times = {
        kind: time_of(result, mode)
        for kind, result in record["results"].items()
        if kind != OURS
        and not kind.startswith(CONTEXT)
        and result.get("error", 0) <= PEER_TOLERANCE
        and time_of(result, mode)
    }
    return min(times.items(), key=lambda item: item[1]) if times else (None, None)


def time_of(result, mode="graph"):
    return result.get(f"{mode}_ms") or result.get("eager_ms")


def judge(record):
    """What each target of a row came to: (text, met), met None where nothing was measured.

    A target is {"of": PEER, "times": N, "mode": "graph" | "eager"}, at least N times as fast as that peer;
    {"of": "floor", "within": N}; or {"of": "memory", "mb": N}.
    """
    ours = record["results"].get(OURS, {})
    verdicts = []
    for target in record["targets"]:
        if target["of"] == "memory":
            value, met = ours.get("peak_mb"), ours.get("peak_mb", math.inf) <= target["mb"]
            text = f"at most {target['mb']} MB"
            reached = value and f"{value:.0f}"
        elif target["of"] == "floor":
            value = time_of(ours) and time_of(ours) / record["floor_ms"]
            met = value is not None and value <= target["within"]
            text = f"within {target['within']} of the floor"
            reached = value and f"{value:.2f}"
        else:
            theirs = time_of(record["results"].get(target["of"], {}), target["mode"])
            value = theirs / time_of(ours, target["mode"]) if theirs and time_of(ours, target["mode"]) else None
            met = value is not None and value >= target["times"]
            text = f"{target['times']} x {target['of']}" + (", eager" if target["mode"] == "eager" else "")
            reached = value and f"{value:.2f}"
        verdicts.append((f"{text}: {reached or 'not measured'}", met if value else None))
    return verdicts


def worst_error(record):
    """The largest of our relative errors and whose it is; NaN is larger than anything."""
    numbers = {n: e for n, e in record["errors"].items() if isinstance(e, (int, float))}
    if not numbers:
        return None, None
    name = max(numbers, key=lambda n: math.inf if math.isnan(numbers[n]) else numbers[n])
    return name, numbers[name]


def is_wrong(record):
    """Whether our numbers may not be used: it did not run, or the check failed."""
    _, error = worst_error(record)
    return error is None or not error <= TOLERANCE or "refuses" in record["results"].get(OURS, {"refuses": ""})


def number(value, digits=3):
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def rates_text(rates):
    copy, product = rates["bytes_per_s"] / 1e12, rates["flop_per_s"] / 1e12
    return f"copy {copy:.3g} TB/s, bfloat16 product {product:.3g} TFLOP/s"


def table(report):
    """The Markdown of one report."""
    return f"{summary(report)}\n\n{details(report)}"


def summary(report):
    """A row for each op, shape and pass."""
    rates = report["ceilings"]
    versions = ", ".join(f"{n} {v}" for n, v in report["versions"].items() if v)
    missing = ", ".join(n for n, v in report["versions"].items() if not v)
    first = report.get("first_step")
    first = (
        f" First training step of a process: {first['compiling']:.1f} s, later {first['cached']:.1f} s."
        if first
        else ""
    )
    lines = [
        f"### {report['gpu']}",
        "",
        f"`{report['command']}`: {rates_text(rates)}. {versions}{f'; not installed: {missing}' if missing else ''}. "
        f"Times in ms, memory in MB.{first}",
        "",
        "| op | shape | pass | graph | eager | best peer | its graph | faster by | its eager | faster by "
        "| floor | times floor | memory, peer's | worst error | target |",
        "|" + "---|" * 15,
    ]
    for record in report["records"]:
        ours = record["results"].get(OURS, {})
        peer, peer_ms = best_peer(record)
        ours_ms = time_of(ours)
        theirs = record["results"].get(peer, {})
        eager, peer_eager = ours.get("eager_ms"), theirs.get("eager_ms")
        name, error = worst_error(record)
        verdicts = [text + {True: " ✓", False: " ✗", None: ""}[met] for text, met in judge(record)]
        wrong = f"**{number(error, 2)}** " if error is not None and not error <= TOLERANCE else f"{number(error, 2)} "
        cells = [
            record["op"],
            record["shape"],
            record["pass"],
            number(ours.get("graph_ms")) or ours.get("graph_refuses", ours.get("refuses", "")),
            number(eager),
            peer or "",
            number(peer_ms) + ("" if "graph_ms" in theirs or not peer else " (eager)"),
            number(peer_ms / ours_ms if peer_ms and ours_ms else None),
            number(peer_eager),
            number(peer_eager / eager if eager and peer_eager else None),
            number(record["floor_ms"]),
            number(ours_ms / record["floor_ms"] if ours_ms else None),
            f"{number(ours.get('peak_mb'))}, {number(theirs.get('peak_mb'))}".strip(", "),
            wrong + name if name else record["errors"].get("check", ""),
            "; ".join(verdicts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if report["skipped"]:
        lines += ["", "Not run: " + "; ".join(report["skipped"]) + "."]
    return "\n".join(lines)


def details(report):
    """A row for each implementation of each of these."""
    lines = [
        "<details><summary>Every implementation</summary>",
        "",
        "| op, shape, pass | implementation | graph | eager | memory | first call, s | error | |",
        "|" + "---|" * 8,
    ]
    for record in report["records"]:
        for kind, result in record["results"].items():
            note = result.get("refuses") or result.get("graph_refuses")
            cells = [
                f"{record['op']} {record['shape']}, {record['pass']}",
                kind,
                number(result.get("graph_ms")),
                number(result.get("eager_ms")),
                number(result.get("peak_mb")),
                number(result.get("first_call_s"), 2),
                number(worst_error(record)[1] if kind == OURS else result.get("error"), 2),
                f"{'refuses' if 'refuses' in result else 'refuses graphs'}: {note}" if note else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "</details>", "", "<details><summary>Kernels of ours, µs of a call</summary>", ""]
    for record in report["records"]:
        spent = record["results"][OURS].get("kernels", [])
        names = (f"{name[:40]} {f'{count} x ' if count > 1 else ''}{total / count:.1f}" for name, count, total in spent)
        if spent:
            lines.append(f"- {record['op']} {record['shape']}, {record['pass']}: {', '.join(names)}")
    return "\n".join([*lines, "", "</details>"])


def write_table(folder):
    """Put the tables of all kernels-*.json in `folder` between the markers of its kernels.md, made if need be.

    Returns:
        The tables.

    Raises:
        ValueError: the page has no such markers.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*.json"))]
    text = "\n\n".join(table(report) for report in reports)
    page = folder / "kernels.md"
    old = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    return text


def training_step(device):
    """One forward and backward pass of every op a Mamba-2 layer and its loss train with; returns the seconds taken."""
    from transpoint.kernels.conv import causal_conv1d
    from transpoint.kernels.kl import linear_kl
    from transpoint.kernels.norm import gated_rms_norm
    from transpoint.kernels.ssd import ssd_scan

    maker = Maker(device)
    half = functools.partial(maker.randn, 2, 512)
    x, taps = leaf(half(2304)), leaf(maker.randn(2304, 4))
    gate, scale = half(576), leaf(maker.randn(576))
    hidden, head, other = leaf(maker.randn(1024, 576)), leaf(maker.randn(4096, 576)), maker.randn(4096, 576)
    start = time.perf_counter()
    mixed = causal_conv1d(x, taps, activation="silu", **maker.backend)
    values, keys, queries, _ = mixed.split([192, 192, 576, 1344], -1)
    parts = (t.unflatten(-1, (-1, 64)) for t in (values, keys, queries))
    steps = maker.steps(2, 512, 9)
    y = ssd_scan(
        *(next(parts), steps["dt"], steps["A"], *parts), D=steps["D"], dt_bias=steps["dt_bias"], **maker.backend
    )
    y = gated_rms_norm(y.flatten(2), scale, gate, groups=9, **maker.backend)
    loss = y.float().mean() + linear_kl(hidden, head, hidden.detach(), other, **maker.backend)
    loss.backward()
    loss.item()
    return time.perf_counter() - start


def first_step(device):
    """Seconds of the first training_step of a new process: with an empty cache of compiled kernels, and again."""
    run = [sys.executable, __file__, "--first-step", "--device", device]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        runs = [subprocess.run(run, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    return dict(zip(("compiling", "cached"), (float(r.stdout.split()[-1]) for r in runs), strict=True))


def slug(gpu):
    """NVIDIA H200 -> h200, NVIDIA H100 80GB HBM3 -> h100."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return next(word for word in words if word not in ("nvidia", "amd", "tesla", "geforce"))


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        with suppress(ImportError):  # its source alone may be on the path
            return getattr(importlib.import_module(package.replace("-", "_")), "__version__", None)
        return None


def command(args):
    """What to type for the same rows, wherever the results go."""
    options = {
        "--only": args.only and shlex.quote(args.only),
        "--device": args.device if args.device != "cuda" else None,
    }
    options["--budget"] = f"{args.budget:g}" if args.budget < math.inf else None
    words = [f"{name} {value}" for name, value in options.items() if value]
    words += [name for name in ("--quick", "--no-peers") if getattr(args, name[2:].replace("-", "_"))]
    return " ".join(["python scripts/bench_kernels.py", *words])


def parse(argv):
    parser = argparse.ArgumentParser(description="Time the kernels and their peers.")
    parser.add_argument("--only", metavar="REGEX", help='rows whose "op shape" matches; printed only, unless --out')
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the JSON and the table (docs/results)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; printed only, unless --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--no-peers", action="store_true", help="time ours alone")
    parser.add_argument("--first-step", action="store_true", help="only print the seconds of a first training step")
    parser.add_argument("--table", action="store_true", help="only make the table again from the JSON")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no row after that")
    args = parser.parse_args(argv)
    if args.device.startswith("cpu") and not (args.quick or args.table or args.first_step):
        parser.error("on the CPU only --quick shapes are worth the wait")
    return args


def main(argv=None):
    start = time.perf_counter()
    args = parse(argv)
    out = args.out or (None if args.only or args.quick or args.no_peers else RESULTS)
    if args.table:
        print(write_table(args.out or RESULTS))
        return 0
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if args.first_step:
        torch.zeros(1, device=args.device)  # the GPU's start is not ours
        print(training_step(args.device))
        return 0
    if cuda:
        tame_autotuners()
    meter = Meter(args.device, patience_ms=10 if args.quick else 100)
    maker = Maker(args.device)
    cases = maker.quick() if args.quick else maker.full()
    if args.only:
        cases = [case for case in cases if re.search(args.only, case.name)]
    report = {
        "gpu": torch.cuda.get_device_name() if cuda else "CPU",
        "command": command(args),
        "versions": {package: version(package) for package in PACKAGES},
        "ceilings": meter.ceilings(),
        "skipped": [],
        "records": [],
    }
    meter.free()
    if cuda and not args.only:
        report["first_step"] = first_step(args.device)
    rates = report["ceilings"]
    say(f"{report['gpu']}: {rates_text(rates)}")
    peers = "" if args.no_peers else ".*" if cuda else "PyTorch"
    for case in cases:
        if time.perf_counter() - start > args.budget:
            report["skipped"].append(f"{case.name} (over budget)")
            continue
        say(f"{case.name}  [{time.perf_counter() - start:.0f} s]")
        try:
            report["records"] += run_case(case, meter, rates, peers)
        except Exception as error:  # the GPU itself: nothing that follows would run
            say(f"  broken: {short(error)}")
            report["skipped"] += [f"{case.name} (broken: {short(error)})", "all that follows"]
            break
        report["seconds"] = time.perf_counter() - start
        if out:  # after every row: a run that is cut off keeps what it has
            out.mkdir(parents=True, exist_ok=True)
            (out / f"kernels-{slug(report['gpu'])}.json").write_text(json.dumps(report, indent=1))
    if out:
        write_table(out)
    say("")
    say(summary(report))
    wrong = sorted({f"{r['op']} {r['shape']}" for r in report["records"] if is_wrong(r)})
    if wrong:
        say("WRONG or not there: " + "; ".join(wrong))
    say(f"{time.perf_counter() - start:.0f} s")
    return 1 if wrong or "all that follows" in report["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
