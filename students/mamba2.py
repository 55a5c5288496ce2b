"""The Mamba-2 mixer (Dao & Gu 2024, arXiv 2405.21060), with the parts of attention a teacher can hand over.

Attention is linear attention with a softmax; Mamba-2 is linear attention with decay. So queries become C, keys B,
values x, and the output projection stays. x and B keep the teacher's key/value heads (no copies), C has its query
heads. This file travels with exported checkpoints: it imports torch only.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cache import by_row

try:  # the fused kernels, where the package is installed
    from transpoint.kernels.conv import causal_conv1d, causal_conv1d_step
    from transpoint.kernels.norm import gated_rms_norm
    from transpoint.kernels.ssd import ssd_scan, ssd_step
except ImportError:  # the plain references, which travel beside this file
    from .conv_reference import causal_conv1d, causal_conv1d_step
    from .norm_reference import gated_rms_norm
    from .ssd_reference import ssd_scan, ssd_step

GATE_OPEN = 1.2784645  # SiLU is 1 there
STEP_ONE = 0.5413249  # softplus is 1 there
PADDING_STEP = -1e4  # softplus is exactly 0 there: a padding token leaves the state as it is
# What decoders hand to self-attention besides, and what changes nothing in a mixer: positions come with the rotary
# embedding, documents are in seq_idx, the rest is about outputs and losses, or about kernels of attention.
UNREAD = {
    "past_key_values",  # the cache, as it was called before transformers 5.24
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "kernel_options",
    "documents",
}
# How flash attention is told of packed documents; mixers have them in seq_idx.
PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class MixerMask(NamedTuple):
    """What a mixer is told of its tokens, by keyword or, in a model, in the place of the attention mask.

    Some families' layers hand on no keywords but their own, and all hand on a mask.
    """

    padding_mask: Tensor | None = None
    seq_idx: Tensor | None = None
    documents: Any = None
    span: Any = None


class WidenedLinear(nn.Linear):
    """A linear map without bias whose outputs lie in rows of a multiple of 8 numbers, as tensor cores want them.

    An odd number of heads makes for a width that they do not take: a product with an older kernel, at half the speed.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        missing = -self.out_features % 8
        if not missing or not torch.is_grad_enabled():  # decoding would copy the weight for each token
            return super().forward(inputs)
        wide = nn.functional.linear(inputs, nn.functional.pad(self.weight, (0, 0, 0, missing)))
        return wide[..., : self.out_features]


class StateSpace(nn.Module):
    """What mixers with a state share: all have conv1d and norm (or None for these), dt_bias, A_log and D."""

    def __init__(self, attention: nn.Module, conv_activation: str | None, gate: bool, rope: bool, norm_eps: float):
        super().__init__()
        self.layer_idx = attention.layer_idx
        self.head_dim = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.conv_activation, self.gate, self.rope, self.norm_eps = conv_activation, gate, rope, norm_eps

    def _memory(self, cache, others: dict, kind: str, packed: bool):
        """This layer's memory in a cache (None without one); it must have the attribute `kind`.

        `others`: the keywords besides. Raises TypeError for one that is not known: it may ask for something that a
        mixer does not do, or be the cache by yet another name.
        """
        cache = others.get("past_key_values") if cache is None else cache
        known = UNREAD | PACKED if packed else UNREAD
        if unknown := [name for name, value in others.items() if value is not None and name not in known]:
            raise TypeError(
                f"layer {self.layer_idx} is a mixer, and does not know the keyword {', '.join(map(repr, unknown))}: "
                f"leave it out; if this version of transformers hands it to each layer, use another one"
            )
        if cache is None:
            return None
        layers = cache.layers
        memory = layers[self.layer_idx] if self.layer_idx < len(layers) else cache
        if not hasattr(memory, kind):
            raise TypeError(
                f"layer {self.layer_idx} is a mixer, but the cache holds a {type(memory).__name__} for it: "
                "pass `cache=model.new_cache()`, or none"
            )
        return memory

    def _padding(self, memory, padding_mask: Tensor | None, length: int) -> tuple[bool, Tensor | None, list[int]]:
        """Of `length` more columns: whether they are a step of decoding, which are padding (B,L,1), or None, and, where
        there is a memory, how many are padding in each row (one entry: in all)."""
        # Padding comes first in a row. Where all rows have begun, one more token is none (and no device is waited for).
        stepping = memory is not None and memory.is_initialized and length == 1 and min(memory.tokens) > 0
        if padding_mask is None or stepping:
            return stepping, None, [0]
        padding = (padding_mask[:, -length:] == 0).unsqueeze(-1)
        if memory is None:
            return stepping, padding, [0]
        pads = padding.sum((1, 2)).tolist()
        return stepping, padding if any(pads) else None, pads

    def _convolve(self, inputs, memory, stepping: bool, padding=None, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        """The convolution of inputs (B,L,channels), and its tail where there is a memory. Padding (B,L,1) is zero
        before it, so that it reaches no token, and after it."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        options = {"activation": self.conv_activation}
        if stepping:
            tail = memory.conv_state.to(inputs.device)
            return causal_conv1d_step(inputs[:, 0], tail, weight, bias, **options)[:, None], tail
        if padding is not None:
            inputs = inputs.masked_fill(padding, 0)
        options["seq_idx"], tail = seq_idx, None
        if memory is None:
            outputs = causal_conv1d(inputs, weight, bias, **options)
        else:
            outputs, tail = causal_conv1d(
                inputs, weight, bias, **options, initial_state=memory.conv_state, return_final_state=True
            )
        return (outputs if padding is None else outputs.masked_fill(padding, 0)), tail

    def _recur(self, x, dt, B, C, state, stepping: bool, remember: bool, seq_idx=None) -> tuple[Tensor, Tensor | None]:
        """What the recurrence reads from `state` on (B,L,H,P), and with `remember` the state after the last token."""
        A, options = -torch.exp(self.A_log.float()), {"D": self.D, "dt_bias": self.dt_bias}
        if stepping:
            state = state.to(x.device)
            return ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], **options)[:, None], state
        options |= {"seq_idx": seq_idx, "initial_state": state}
        if remember:
            return ssd_scan(x, dt, A, B, C, **options, return_final_state=True)
        return ssd_scan(x, dt, A, B, C, **options), None

    def _gate_and_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        """What comes after the recurrence, on y (B,L,H*P); z of the same shape, or None without a gate."""
        if self.norm is not None:
            return gated_rms_norm(y, self.norm.weight, z, groups=self.num_heads, eps=self.norm_eps)
        return y if z is None else y * nn.functional.silu(z)


class Mamba2Mixer(StateSpace):
    """A Mamba-2 mixer with the call signature of self-attention. H heads, K key/value heads, head_dim P = state N.

    Rows of `in_proj`: z (H*P, if gated), x (K*P), B (K*N), C (H*N), dt (H). x, B and C pass a causal depthwise
    convolution (its bias is theirs: `in_proj` has none, so that padding stays zero up to the convolution) and an
    optional SiLU; B and C then the teacher's k/q norm and rotary embedding, where those are kept.

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T
        y_t = S_t C_t + D x_t
        out = out_proj(norm(y_t * SiLU(z_t)))

    Args:
        attention: the self-attention it replaces, of the student's own tree: heads, norms and scale are read off it.
        conv_kernel: taps of the convolution (1: a scale and a bias).
        conv_activation: "silu" or None, after the convolution.
        gate: whether the output is gated by SiLU(z).
        norm: whether the gated output is RMS-normalised, one head at a time.
        rope: whether B and C take the teacher's rotary embedding.
        qk_norm: whether B and C take the teacher's k/q norms, where it has them.
    """

    def __init__(
        self,
        attention: nn.Module,
        *,
        conv_kernel: int = 4,
        conv_activation: str | None = "silu",
        gate: bool = True,
        norm: bool = True,
        rope: bool = False,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, conv_activation, gate, rope, norm_eps)
        P, H, K = self.head_dim, self.num_heads, self.num_kv_heads
        self.sizes = {"z": H * P if gate else 0, "x": K * P, "B": K * P, "C": H * P, "dt": H}
        hidden_size, channels = attention.q_proj.in_features, (2 * K + H) * P

        self.in_proj = WidenedLinear(hidden_size, sum(self.sizes.values()), bias=False)
        self.z_bias = nn.Parameter(torch.full((H * P,), GATE_OPEN)) if gate else None
        # The parameters of a depthwise convolution; the convolution itself is `causal_conv1d`.
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels)
        norms = qk_norm and hasattr(attention, "q_norm")
        self.q_norm, self.k_norm = (attention.q_norm, attention.k_norm) if norms else (None, None)
        # Without norms the scale of q.k is folded into the rows of C; a norm would undo that.
        self.scale = float(attention.scaling) if norms else 1.0
        self.dt_bias = nn.Parameter(torch.full((H,), STEP_ONE))
        self.A_log = nn.Parameter(torch.zeros(H))
        self.D = nn.Parameter(torch.zeros(H))
        self.norm = nn.Module() if norm else None
        if norm:
            self.norm.weight = nn.Parameter(torch.ones(H * P))
        self.out_proj = nn.Linear(H * P, hidden_size, bias=attention.o_proj.bias is not None)

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
        if isinstance(attention_mask, MixerMask):
            padding_mask, seq_idx, *_ = attention_mask
        batch, length, _ = hidden_states.shape
        memory = self._memory(cache, others, "ssm_state", packed=seq_idx is not None)
        if seq_idx is not None:
            seq_idx = seq_idx.expand(batch, -1)
        stepping, padding, pads = self._padding(memory, padding_mask, length)

        widths = [self.sizes["z"], self.sizes["x"] + self.sizes["B"] + self.sizes["C"], self.sizes["dt"]]
        z, xBC, dt = self.in_proj(hidden_states).split(widths, dim=-1)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)
        xBC, conv_state = self._convolve(xBC, memory, stepping, padding, seq_idx)

        x, B, C = (
            part.unflatten(-1, (-1, self.head_dim))
            for part in xBC.split([self.sizes["x"], self.sizes["B"], self.sizes["C"]], dim=-1)
        )
        if self.q_norm is not None:
            B, C = self.k_norm(B), self.q_norm(C) * self.scale
        if self.rope:
            B, C = rotate(B, position_embeddings), rotate(C, position_embeddings)

        state = None if memory is None else memory.ssm_state
        y, ssm_state = self._recur(x, dt, B, C, state, stepping, memory is not None, seq_idx)
        if memory is not None:
            counts = zip(*by_row(memory.tokens, pads), strict=True)
            memory.advance(conv_state, ssm_state, length, [seen + length - pad for seen, pad in counts])
        y = self._gate_and_norm(y.flatten(2), z + self.z_bias if self.gate else None)
        return self.out_proj(y.to(hidden_states.dtype)), None

    @property
    def out(self) -> nn.Linear:
        """The output projection, whatever the mixer calls it."""
        return self.out_proj

    def state_space_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name that only the state-space form has: here all, for there is no other form."""
        return dict(self.named_parameters())

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, rope={self.rope}"


def rotate(t: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the leading dimensions of t (B,L,heads,N), half-split layout."""
    cos, sin = (table.unsqueeze(2).to(t.dtype) for table in position_embeddings)
    turned, rest = t.split([cos.shape[-1], t.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)
