"""What is measured: one case for an op at a shape, with random inputs, peers and floors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from transpoint.kernels import (
    conv,
    conv_reference,
    delta,
    delta_reference,
    kl,
    kl_reference,
    matching,
    matching_reference,
    norm,
    norm_reference,
    selective,
    selective_reference,
    ssd,
    ssd_reference,
)

from . import floors, peers
from .floors import STEP
from .inputs import randn, uniform

CHECKED = 2048  # tokens of the last sequence that the reference computes; later ones cannot change earlier outputs


@dataclass
class Case:
    """One op at one shape."""

    op: str
    shape: str
    make: Callable[[], dict[str, Tensor]]  # fresh random inputs
    ours: Callable[..., Tensor]  # of the inputs, by name
    reference: Callable[..., Tensor]  # of float64 copies of the inputs, by name
    peers: dict[str, Callable[[dict], peers.Call]]
    costs: dict[str, tuple[float, float]]  # pass -> bytes, floating-point operations
    leaves: tuple[str, ...] = ()  # inputs with gradients
    sliced: tuple[str, ...] = ()  # inputs that `cut` cuts
    cut: Callable[[Tensor], Tensor] = lambda t: t  # the slice of inputs and output that the reference computes
    mutated: tuple[str, ...] = ()  # inputs that a call changes
    targets: dict[str, list[dict]] = field(default_factory=dict)  # pass -> see `judge.verdict`

    @property
    def name(self):
        return f"{self.op} {self.shape}"


class Maker:
    """Builds cases on one device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16):
        self.device, self.dtype = torch.device(device), dtype
        # Ours must be the kernels on a GPU, not a silent fall-back.
        self.backend = {"backend": "triton"} if self.device.type == "cuda" else {}

    def randn(self, *shape, dtype=None, scale=1.0):
        return randn(shape, self.device, dtype or self.dtype, scale)

    def steps(self, *shape):
        """dt, dt_bias, A and D as in a Mamba-2 layer: steps of about 0.001 to 0.1, decay rates of 1 to 16."""
        heads = shape[-1]
        step = uniform(math.log(1e-3), math.log(1e-1), heads, self.device).exp()
        return {
            "dt": self.randn(*shape, scale=0.5),
            "dt_bias": step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
            "A": -uniform(1, 16, heads, self.device),
            "D": self.randn(heads, dtype=torch.float32),
        }

    def scan(self, batch, length, heads, head_dim, state, *, kv=None, groups=None, attention=2, plain=False):
        """ssd_scan. kv: heads of x and B. groups: heads of B and C. attention: how many kinds of it for context."""
        counts = kv or heads, kv or groups or heads, groups or heads
        others = {"mamba_ssm": peers.mamba_scan, "fla core": peers.fla_core, "fla": peers.fla_scan}
        if plain:
            others["PyTorch"] = peers.plain(ssd_reference.ssd_scan)
        kinds = {"attention, cuDNN": "CUDNN_ATTENTION", "attention, flash": "FLASH_ATTENTION"}
        others |= {name: partial(peers.attention, kind) for name, kind in list(kinds.items())[:attention]}
        return Case(
            op="ssd_scan",
            shape=f"{batch},{length},{heads},{head_dim},{state}, " + (f"kv {kv}" if kv else f"groups {counts[1]}"),
            make=lambda: self._scan_inputs((batch, length), heads, head_dim, state, *counts),
            ours=partial(ssd.ssd_scan, **self.backend),
            reference=ssd_reference.ssd_scan,
            peers=others,
            costs=floors.scan_cost(batch, length, heads, head_dim, state, *counts),
            leaves=("x", "dt", "A", "B", "C", "D", "dt_bias"),
            sliced=("x", "dt", "B", "C"),
            cut=lambda t: t[-1:, :CHECKED],
        )

    def step(self, batch, heads, head_dim, state, *, kv=None, groups=None, state_dtype=torch.float32):
        """ssd_step, which updates the state in place."""
        counts = kv or heads, kv or groups or heads, groups or heads
        heads_text = f"kv {kv}" if kv else f"groups {counts[1]}"
        dtype_text = "fp32" if state_dtype == torch.float32 else "bf16"
        return Case(
            op="ssd_step",
            shape=f"{batch},{heads},{head_dim},{state}, {heads_text}, {dtype_text} state",
            make=lambda: {
                "state": self.randn(batch, heads, head_dim, state, dtype=state_dtype),
                **self._scan_inputs((batch,), heads, head_dim, state, *counts),
            },
            ours=partial(ssd.ssd_step, **self.backend),
            reference=ssd_reference.ssd_step,
            peers={"mamba_ssm": peers.mamba_step, "PyTorch": peers.plain(ssd_reference.ssd_step)},
            costs=floors.step_cost(batch, heads, head_dim, state, *counts, state_dtype.itemsize),
            sliced=("state", "x", "dt", "B", "C"),
            cut=lambda t: t[-16:],
            mutated=("state",),
        )

    def delta(self, batch, length, heads, head_dim, state, *, keys):
        """delta_scan. keys: heads of q and k."""
        return Case(
            op="delta_scan",
            shape=f"{batch},{length},{heads},{head_dim},{state}, keys {keys}",
            make=lambda: self._delta_inputs((batch, length), heads, head_dim, state, keys),
            ours=partial(delta.delta_scan, **self.backend),
            reference=delta_reference.delta_scan,
            peers={"fla": peers.fla_delta, "PyTorch": peers.plain(delta_reference.delta_scan)},
            costs=floors.delta_cost(batch, length, heads, head_dim, state, keys),
            leaves=("q", "k", "v", "g", "beta"),
            sliced=("q", "k", "v", "g", "beta"),
            cut=lambda t: t[-1:, :CHECKED],
        )

    def delta_step(self, batch, heads, head_dim, state, *, keys):
        """delta_step, which updates the state in place."""
        return Case(
            op="delta_step",
            shape=f"{batch},{heads},{head_dim},{state}, keys {keys}, fp32 state",
            make=lambda: {
                "state": self.randn(batch, heads, head_dim, state, dtype=torch.float32),
                **self._delta_inputs((batch,), heads, head_dim, state, keys),
            },
            ours=partial(delta.delta_step, **self.backend),
            reference=delta_reference.delta_step,
            peers={"fla": peers.fla_delta_step, "PyTorch": peers.plain(delta_reference.delta_step)},
            costs=floors.step_cost(batch, heads, head_dim, state, heads, keys, keys, state_size=4),
            sliced=("state", "q", "k", "v", "g", "beta"),
            cut=lambda t: t[-16:],
            mutated=("state",),
        )

    def selective(self, batch, length, channels, state, *, groups):
        """selective_scan. groups: of B and C."""
        return Case(
            op="selective_scan",
            shape=f"{batch},{length},{channels},{state}, groups {groups}",
            make=lambda: self._selective_inputs((batch, length), channels, state, groups),
            ours=partial(selective.selective_scan, **self.backend),
            reference=selective_reference.selective_scan,
            peers={
                "mamba_ssm": peers.mamba_selective,
                "PyTorch": peers.plain(selective_reference.selective_scan),
            },
            costs=floors.selective_cost(batch, length, channels, state, groups),
            leaves=("x", "dt", "A", "B", "C", "D", "dt_bias"),
            sliced=("x", "dt", "B", "C"),
            cut=lambda t: t[-1:, :CHECKED],
        )

    def selective_step(self, batch, channels, state, *, groups):
        """selective_step, which updates the state in place."""
        return Case(
            op="selective_step",
            shape=f"{batch},{channels},{state}, groups {groups}, fp32 state",
            make=lambda: {
                "state": self.randn(batch, channels, state, dtype=torch.float32),
                **self._selective_inputs((batch,), channels, state, groups),
            },
            ours=partial(selective.selective_step, **self.backend),
            reference=selective_reference.selective_step,
            peers={
                "mamba_ssm": peers.mamba_selective_step,
                "PyTorch": peers.plain(selective_reference.selective_step),
            },
            costs=floors.step_cost(batch, channels, 1, state, channels, groups, groups, state_size=4),
            sliced=("state", "x", "dt", "B", "C"),
            cut=lambda t: t[-16:],
            mutated=("state",),
        )

    def distance(self, batch, length, heads, head_dim, state, kv):
        """mixing_distance; k and B have `kv` heads."""

        def make():
            steps = self.steps(batch, length, heads)
            del steps["D"]
            return {
                "q": self.randn(batch, length, heads, head_dim),
                "k": self.randn(batch, length, kv, head_dim),
                "B": self.randn(batch, length, kv, state, scale=state**-0.25),
                "C": self.randn(batch, length, heads, state, scale=state**-0.25),
                **steps,
            }

        return Case(
            op="mixing_distance",
            shape=f"{batch},{length},{heads},{head_dim},{state}, kv {kv}",
            make=make,
            ours=partial(matching.mixing_distance, **self.backend),
            reference=matching_reference.mixing_distance,
            peers={"PyTorch": peers.whole_matrices},
            costs=floors.distance_cost(batch, length, heads, head_dim, state, kv),
            leaves=("dt", "A", "B", "C", "dt_bias"),
            sliced=("q", "k", "dt", "B", "C"),
            cut=lambda t: t[-1:],
        )

    def conv(self, batch, length, channels, width=4):
        return Case(
            op="causal_conv1d",
            shape=f"{batch},{length},{channels}, width {width}",
            make=lambda: {"x": self.randn(batch, length, channels), **self._filter(channels, width)},
            ours=partial(conv.causal_conv1d, activation="silu", **self.backend),
            reference=partial(conv_reference.causal_conv1d, activation="silu"),
            peers={
                "fla": peers.fla_conv,
                "fla, Gluon": partial(peers.fla_conv, gluon=True),
                "causal-conv1d": peers.cuda_conv,
                "PyTorch": peers.torch_conv,
            },
            costs=floors.elementwise_cost(batch * length * channels, inputs=1),
            leaves=("x", "weight", "bias"),
            sliced=("x",),
            cut=lambda t: t[-1:, :CHECKED],
        )

    def conv_step(self, batch, channels, width=4):
        """causal_conv1d_step, which updates the last inputs in place."""
        reference = partial(conv_reference.causal_conv1d_step, activation="silu")
        return Case(
            op="causal_conv1d_step",
            shape=f"{batch},{channels}, width {width}",
            make=lambda: {
                "x": self.randn(batch, channels),
                "conv_state": self.randn(batch, width - 1, channels).mT,  # as causal_conv1d leaves it
                **self._filter(channels, width),
            },
            ours=partial(conv.causal_conv1d_step, activation="silu", **self.backend),
            reference=reference,
            peers={"fla": peers.fla_conv_step, "PyTorch": peers.plain(reference)},
            costs={STEP: (2 * batch * channels * 2 * width, 0)},
            sliced=("x", "conv_state"),
            cut=lambda t: t[-16:],
            mutated=("conv_state",),
        )

    def norm(self, tokens, channels, groups=1):
        reference = partial(norm_reference.gated_rms_norm, groups=groups)
        return Case(
            op="gated_rms_norm",
            shape=f"{tokens},{channels}, groups {groups}",
            make=lambda: {
                "x": self.randn(tokens, channels),
                "weight": self.randn(channels, scale=0.1) + 1,
                "z": self.randn(tokens, channels),
            },
            ours=partial(norm.gated_rms_norm, groups=groups, **self.backend),
            reference=reference,
            peers={
                "mamba_ssm": partial(peers.gated_norm, "mamba_ssm.ops.triton.layernorm_gated", groups),
                "fla": partial(peers.gated_norm, "fla.modules.norm.layernorm_gated", groups),
                "PyTorch": peers.plain(reference),
            },
            costs=floors.elementwise_cost(tokens * channels, inputs=2),
            leaves=("x", "weight", "z"),
            sliced=("x", "z"),
            cut=lambda t: t[-4096:],
        )

    def kl(self, tokens, hidden, vocab):
        scale = 2 / math.sqrt(hidden)  # logits of standard deviation 2
        return Case(
            op="linear_kl",
            shape=f"{tokens}, {hidden}x{vocab}",
            make=lambda: {
                "student_hidden": self.randn(tokens, hidden),
                "student_weight": self.randn(vocab, hidden, scale=scale),
                "teacher_hidden": self.randn(tokens, hidden),
                "teacher_weight": self.randn(vocab, hidden, scale=scale),
            },
            ours=partial(kl.linear_kl, **self.backend),
            reference=kl_reference.linear_kl,
            peers={
                "fla, bf16 sums": partial(peers.fla_kl, fp32=False),
                "fla, fp32 sums": partial(peers.fla_kl, fp32=True),
                "Liger JSD": peers.liger_jsd,
                "Liger KL": peers.liger_kl,
                "PyTorch": peers.torch_kl,
            },
            costs=floors.kl_cost(tokens, hidden, hidden, vocab),
            leaves=("student_hidden", "student_weight"),
        )

    def _scan_inputs(self, tokens, heads, head_dim, state, x_heads, b_heads, c_heads):
        shapes = {"x": (x_heads, head_dim), "B": (b_heads, state), "C": (c_heads, state)}
        return {n: self.randn(*tokens, *shape) for n, shape in shapes.items()} | self.steps(*tokens, heads)

    def _delta_inputs(self, tokens, heads, head_dim, state, keys):
        """As in a gated DeltaNet layer: keys and queries of length 1, decays as in Mamba-2."""
        q, k = (F.normalize(self.randn(*tokens, keys, state), dim=-1) for _ in range(2))
        steps = self.steps(*tokens, heads)
        g = steps["A"] * F.softplus(steps["dt"].float() + steps["dt_bias"])
        beta = self.randn(*tokens, heads, dtype=torch.float32).sigmoid()
        return {"q": q, "k": k, "v": self.randn(*tokens, heads, head_dim), "g": g, "beta": beta}

    def _selective_inputs(self, tokens, channels, state, groups):
        """As in a Mamba-1 layer: steps as in Mamba-2, and rates of 1 to N for the numbers of a state."""
        maps = {name: self.randn(*tokens, groups, state) for name in ("B", "C")}
        rates = -torch.arange(1.0, state + 1, device=self.device).expand(channels, -1).contiguous()
        return {"x": self.randn(*tokens, channels), **self.steps(*tokens, channels), "A": rates, **maps}

    def _filter(self, channels, width):
        return {"weight": self.randn(channels, width, scale=0.5), "bias": self.randn(channels, scale=0.1)}
