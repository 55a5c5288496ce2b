"""What mixers share that attend as the teacher does: its four projections and norms, and softmax attention by them.

This file travels with exported checkpoints: it imports torch only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import Documents, Span, take
from .modeling_mixer import Geometry, Mixer, MixerMask, Transfer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Projections(Mixer):
    """A mixer with attention's projections, in four layers of their own, wherever the teacher has them."""

    copied = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.")
    spanned = True
    sinks = 0
    point: Tensor | None = None  # the TransPoint on the device, where a `Span` reads it

    def add_projections(self, attention: nn.Module, geometry: Geometry, linear=nn.Linear) -> None:
        """Makes the projections, and takes over the norms of the attention that it replaces.

        linear: of what kind the projections are; takes their inputs and outputs, and whether there is a bias.
        """
        P, H, K = self.head_dim, self.num_heads, self.num_kv_heads
        self.scale: float = geometry.scale
        self.window: int | None = geometry.window
        hidden_size, biases = geometry.hidden_size, geometry.biases
        self.q_proj = linear(hidden_size, H * P, bias="q_proj" in biases)
        self.k_proj = linear(hidden_size, K * P, bias="k_proj" in biases)
        self.v_proj = linear(hidden_size, K * P, bias="v_proj" in biases)
        self.o_proj = linear(H * P, hidden_size, bias="o_proj" in biases)
        normed = geometry.norm_over is not None
        self.q_norm = attention.get_submodule("q_norm") if normed else None
        self.k_norm = attention.get_submodule("k_norm") if normed else None

    @property
    def out(self) -> nn.Linear:
        return self.o_proj

    def transfers(self, view) -> list[Transfer]:
        found = []
        for name in PROJECTIONS:
            for part in ("weight",) if getattr(view, name).bias is None else ("weight", "bias"):
                found.append(Transfer.taken(f"{view.name}.{name}.{part}", view, name, part))
        return found

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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        """Causal softmax attention (B,Q,H*P) of queries (B,Q,H,P), which are the last of the S keys and values
        (B,S,K,P), in the window.

        `real` (B,S): keys that are no padding.
        """
        if q.shape[1] == 1 and self.window is not None:
            k, v = (t[:, -self.window :] for t in (k, v))
            real = None if real is None else real[:, -self.window :]
        queries, held = q.shape[1], k.shape[1]
        mask = None if real is None else real[:, None, None]
        if real is not None or (queries > 1 and (queries < held or (self.window or held) < held)):
            row = torch.arange(held - queries, held, device=q.device)[:, None]
            column = torch.arange(held, device=q.device)
            mask = (column <= row) & (column > row - (self.window or held))
            if real is not None:  # padding sees itself, as a softmax over nothing would be no number
                mask = (mask & real[:, None, None]) | (column == row)
        return self._one(q, k, v, mask) if queries == 1 else self._softmax(q, k, v, mask)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention (B,1,H*P) of one query a row to all keys, or those where mask (B,1,1,S) is true: query heads that
        share a key are as queries of one head, and no key is copied."""
        q = q.view(len(q), self.num_kv_heads, self.num_heads // self.num_kv_heads, -1)
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask, scale=self.scale)
        return y.reshape(len(q), 1, -1)

    def _by_document(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, until: int) -> Tensor:
        """The same (B,L,H*P) over the first `until` tokens of each packed document."""
        # A row wider than its document reads on into the next one, which the causal mask keeps from its own tokens.
        groups, out, back = documents.prefixes(until)
        sizes = [rows * width for rows, width in groups]
        laid = (take(t.flatten(0, 1), out, back).split(sizes) for t in (q, k, v))
        parts = [
            self._attend(*(t.unflatten(0, group) for t in operands)).flatten(0, 1)
            for group, operands in zip(groups, zip(*laid, strict=True), strict=True)
        ]
        return take(torch.cat(parts), back, out).view(*q.shape[:2], -1)

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
