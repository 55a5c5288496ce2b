"""What mixers share that have a state beside attention's own projections: one set of weights for both.

Softmax attention and Mamba-2 read the same three projections: queries are C, keys B, values x. So such a mixer keeps
the teacher's own projections, norms and rotary embedding, and adds what only the recurrence has: step, decay and skip.
This file travels with exported checkpoints: it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import Span
from .modeling_mixer import Geometry, MixerMask, Transfer
from .state_space import GATE_OPEN, SILU_INPUT, StateSpace, WidenedLinear


class SharedProjections(StateSpace):
    """Attention's four projections and its norms, and a state that reads them.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention. The projections are in four layers of their own, wherever the teacher has them.
        conv_kernel: taps of a causal depthwise convolution over v, k and q (0: none), for the state alone, as all that
            follows.
        conv_activation: "silu" or None, after the convolution.
        gate: whether what the state gives is gated by SiLU(z).
        norm: whether that is RMS-normalised, one head at a time.
        rope: whether B and C take the teacher's rotary embedding.
        qk_norm: whether B and C take the teacher's k/q norms, where it has them.
    """

    copied = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.")
    sinks = 0
    point: Tensor | None = None  # the TransPoint on the device, where a `Span` reads it

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        conv_kernel: int,
        conv_activation: str | None,
        gate: bool,
        norm: bool,
        rope: bool,
        qk_norm: bool,
        norm_eps: float,
    ):
        super().__init__(attention, geometry, conv_activation, gate, rope, norm_eps)
        P, H, K = self.head_dim, self.num_heads, self.num_kv_heads
        self.scale: float = geometry.scale
        self.window: int | None = geometry.window
        hidden_size, biases = geometry.hidden_size, geometry.biases

        self.q_proj = nn.Linear(hidden_size, H * P, bias="q_proj" in biases)
        self.k_proj = nn.Linear(hidden_size, K * P, bias="k_proj" in biases)
        self.v_proj = nn.Linear(hidden_size, K * P, bias="v_proj" in biases)
        self.o_proj = nn.Linear(H * P, hidden_size, bias="o_proj" in biases)
        normed = geometry.norm_over is not None
        self.q_norm = attention.get_submodule("q_norm") if normed else None
        self.k_norm = attention.get_submodule("k_norm") if normed else None
        self.qk_norm = qk_norm and normed
        # Without a convolution both forms read the same values and keys, and a cache holds them once.
        placed = rope or not geometry.rotary_dim
        self.shared = not conv_kernel and placed and self.qk_norm == normed

        self.dt_proj = WidenedLinear(hidden_size, H, bias=False)
        self.add_recurrence(conv_kernel, norm)
        self.z_proj = nn.Linear(hidden_size, H * P) if gate else None
        if self.z_proj is not None:
            nn.init.constant_(self.z_proj.bias, GATE_OPEN)

    @property
    def out(self) -> nn.Linear:
        """The output projection, whatever the mixer calls it."""
        return self.o_proj

    def state_space_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name that only the state-space form has."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(self.copied)}

    def transfers(self, view) -> list[Transfer]:
        found = []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for part in ("weight",) if getattr(view, name).bias is None else ("weight", "bias"):
                found.append(Transfer.taken(f"{view.name}.{name}.{part}", view, name, part))
        if self.conv1d is not None:
            channel, silu = 0, self.conv_activation == "silu"
            for part, heads in (("x", self.num_kv_heads), ("B", self.num_kv_heads), ("C", self.num_heads)):
                channels, channel = (channel, channel + heads * self.head_dim), channel + heads * self.head_dim
                tap = SILU_INPUT[part] if silu else 1.0
                found.append(Transfer(f"{view.name}.conv1d.weight", "identity", rows=channels, part=part, value=tap))
            found.append(Transfer(f"{view.name}.conv1d.bias", "constant", value=0.0))
        if self.gate:
            found.append(Transfer(f"{view.name}.z_proj.weight", "constant", value=0.0))
            found.append(Transfer(f"{view.name}.z_proj.bias", "constant", value=GATE_OPEN))
        found.append(Transfer(f"{view.name}.dt_proj.weight", "constant", value=0.0))
        return found + self.recurrence_transfers(view.name)

    def _read(self, hidden: Tensor, projected, placed, position_embeddings, seq_idx: Tensor) -> Tensor:
        """What the heads read (B,L,H*P) from the state, over packed documents."""
        (q, k, x), (C, B) = projected, placed
        if not self.shared:
            x, B, C, _ = self._inputs(q, k, x, position_embeddings, seq_idx=seq_idx)
        B, C = self.features(B, C)
        read, _ = self._recur(x, self.dt_proj(hidden), B, C, None, False, False, seq_idx)
        return self._gate_and_norm(read.flatten(2), None if self.z_proj is None else self.z_proj(hidden))

    def features(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """What of keys B (B,L,K,P) and queries C (B,L,H,P) the state is written and read by."""
        return B, C * self.scale

    def _project(self, hidden: Tensor) -> list[Tensor]:
        """Queries (B,L,H,P), keys and values (B,L,K,P), as they leave the projections."""
        return [p(hidden).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)]

    def _placed(self, q: Tensor, k: Tensor, position_embeddings) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention reads them."""
        return self.place(q, self.q_norm, position_embeddings), self.place(k, self.k_norm, position_embeddings)

    def _check_packed(self, told: MixerMask, memory) -> None:
        """Raises ValueError for packed documents with a cache or padding, and for what is said of them without them."""
        if told.seq_idx is None:
            if told.documents is not None or told.span is not None:
                raise ValueError("documents and span are those of seq_idx: give it, too")
        elif memory is not None or told.padding_mask is not None:
            raise ValueError("packed documents take neither a cache nor padding: leave out seq_idx, or the others")

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention (B,Q,H*P) of queries (B,Q,H,P) to keys and values (B,S,K,P) where `mask`, which broadcasts
        to (B,H,Q,S), is true; None: causal, with Q = S."""
        groups = self.num_heads // self.num_kv_heads
        if mask is not None and groups > 1:  # with a mask, the fused kernels of CUDA know no groups
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=mask is None and groups > 1,
        )
        return y.transpose(1, 2).flatten(2)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """The same (B,L,H*P) within packed documents, by flex_attention."""
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        y = flex_attention(  # type: ignore[call-overload]  # its options are a TypedDict
            q, k, v, block_mask=span.mask, scale=self.scale, enable_gqa=True, kernel_options=span.options
        )
        return y.transpose(1, 2).flatten(2)

    def _inputs(self, q, k, v, position_embeddings, memory=None, stepping=False, padding=None, seq_idx=None):
        """x (B,L,K,P), B (B,L,K,N), C (B,L,H,N) where they are not those of attention, and the convolution's tail."""
        tail = None
        if self.conv1d is not None:
            inputs = torch.cat([t.flatten(2) for t in (v, k, q)], -1)
            mixed, tail = self._convolve(inputs, memory, stepping, padding, seq_idx)
            widths = [t.shape[2] * self.head_dim for t in (v, k, q)]
            v, k, q = (t.unflatten(-1, (-1, self.head_dim)) for t in mixed.split(widths, -1))
        norms = (self.k_norm, self.q_norm) if self.qk_norm else (None, None)
        B, C = (
            self.place(t, n, position_embeddings if self.rope else None) for t, n in zip((k, q), norms, strict=True)
        )
        return v, B, C, tail
