"""What mixers share whose first projections are rows of one matrix, as released Mamba and gated DeltaNet layers have
them: where these rows, the convolution after them, and the output projection come from.

This file travels with exported checkpoints: it imports torch only.
"""

import torch
from torch import Tensor, nn

from .modeling_mixer import Heads, Transfer
from .state_space import GATE_OPEN, SILU_INPUT, StateSpace


class FusedProjection(StateSpace):
    """A mixer with `in_proj`, of which part by part `sizes` says the rows; z_bias (or None); conv1d; and out_proj."""

    copied = ("in_proj.", "out_proj.", "q_norm.", "k_norm.")
    sizes: dict[str, int]
    in_proj: nn.Linear
    z_bias: nn.Parameter | None
    out_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache=None,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Mixes hidden states (B,L,hidden) along L.

        Args:
            position_embeddings: cos and sin (B or 1, L, R), used with `rope`.
            attention_mask: a `MixerMask`, in place of the keywords of its names; another one is not read.
            cache: a `HybridCache`, updated; `past_key_values` is the same.
            padding_mask: (B, at least L), 1 for tokens and 0 for padding; its last L columns belong to these tokens.
            seq_idx: (B or 1, L) document index of packed sequences: the convolution and the state start anew at each.

        Returns:
            The output (B,L,hidden), and None where attention has its weights.

        Raises:
            TypeError: a keyword that is not known; or the cache is one without a state for this layer.
        """
        padding_mask, seq_idx, *_ = self.told(attention_mask, padding_mask, seq_idx)
        batch, length, _ = hidden_states.shape
        memory = self.memory(cache, others, packed=seq_idx is not None)
        if seq_idx is not None:
            seq_idx = seq_idx.expand(batch, -1)
        stepping, padding, pads = self._padding(memory, padding_mask, length)
        where = (memory, stepping, padding, seq_idx)
        z, x, B, C, dt, conv_state = self._project(hidden_states, position_embeddings, *where)
        state = None if memory is None else memory.ssm_state
        y, ssm_state = self._recur(x, dt, B, C, state, stepping, memory is not None, seq_idx)
        if memory is not None:
            if memory.mergeable:
                memory.decay_by(self.log_decay(dt))
            memory.advance(conv_state, ssm_state, length, memory.tokens_after(length, pads))
        if self.z_bias is not None:
            z = z + self.z_bias
        y = self._gate_and_norm(y.flatten(2), z if self.gate else None)
        return self.out_proj(y.to(hidden_states.dtype)), None

    def _project(self, hidden: Tensor, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        """z, what `_recur` takes (x, B, C and dt) of hidden states (B,L,hidden), and the convolution's tail."""
        raise NotImplementedError

    def take_norms(self, attention: nn.Module, qk_norm: bool) -> None:
        """The teacher's k/q norms, where it has them and they are wanted."""
        norms = qk_norm and self.geometry.norm_over is not None
        self.q_norm = attention.get_submodule("q_norm") if norms else None
        self.k_norm = attention.get_submodule("k_norm") if norms else None

    def projection_transfers(self, view, sources: dict[str, tuple[str, float, str, Heads]]) -> list[Transfer]:
        """Of projections, convolution, the gate's bias, the recurrence and the output projection.

        Args:
            view: of the teacher's attention.
            sources: for parts of `in_proj` the teacher's projection, a factor, which of x, B and C it is for the SiLU,
                and how its heads are laid out. Other parts start at zero.
        """

        def named(*parts: str) -> str:
            return ".".join((view.name, *parts))

        found: list[Transfer] = []
        row = channel = 0
        for part, size in self.sizes.items():
            rows, row = (row, row + size), row + size
            if part not in sources:
                if size:
                    found.append(Transfer(named("in_proj.weight"), "constant", rows=rows, part=part, value=0.0))
                continue
            projection, factor, kind, laid = sources[part]
            heads = laid if laid.repeats * laid.factor > 1 else None
            channels, channel = (channel, channel + size), channel + size
            tap = SILU_INPUT[kind] if self.conv_activation == "silu" else 1.0
            weight, bias = named("in_proj.weight"), named("conv1d.bias")
            found += [
                Transfer.taken(weight, view, projection, "weight", rows, part, factor=factor, heads=heads),
                Transfer(named("conv1d.weight"), "identity", rows=channels, part=part, value=tap, heads=heads),
            ]
            if getattr(view, projection).bias is not None:
                scaled = factor * tap
                found.append(Transfer.taken(bias, view, projection, "bias", channels, part, factor=scaled, heads=heads))
            elif self.conv1d is not None and self.conv1d.bias is not None:
                found.append(Transfer(bias, "constant", rows=channels, part=part, value=0.0))
        if self.z_bias is not None:
            found.append(Transfer(named("z_bias"), "constant", value=GATE_OPEN))
        found += self.recurrence_transfers(view.name)
        for parameter in ("weight",) if view.o_proj.bias is None else ("weight", "bias"):
            found.append(Transfer.taken(named("out_proj", parameter), view, "o_proj", parameter))
        return found

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        super().start(generator, spread)
        if self.z_bias is not None:
            self.z_bias.zero_()

    def drops(self, view) -> list[str]:
        return ["q_norm.", "k_norm."] if self.q_norm is None else []

    @property
    def gate_shut(self) -> bool:
        return self.gate and self.z_bias is None

    @torch.no_grad()
    def open_gate(self, row: Tensor) -> None:
        self.in_proj.weight[: self.sizes["z"]] = GATE_OPEN * row

    @property
    def out(self) -> nn.Linear:
        return self.out_proj

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rope={self.rope}"
