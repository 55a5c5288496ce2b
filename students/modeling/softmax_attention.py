"""Softmax attention as a mixer: the teacher's own, which may be narrowed to a window or go without positions.

It is what a layer plan makes of kept attention, as in published hybrids. This file travels with exported checkpoints:
it imports torch only.
"""

import math
from typing import cast

from torch import Tensor, nn

from .cache_layers import KeysLayer
from .documents import Documents, Span
from .modeling_mixer import Geometry, attention_flops
from .projections import Projections


class SoftmaxMixer(Projections):
    """Attention with the call signature of self-attention. With the defaults it is the teacher's.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention.
        attention_window: how many last tokens a query sees, and no more than the teacher's does; None: as many.
        attention_positions: whether queries and keys take the teacher's rotary embedding.
        norm_eps: given to every mixer; this one has no norm of its own.
    """

    remembers = KeysLayer
    trans_point = math.inf

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        attention_window: int | None = None,
        attention_positions: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry)
        self.add_projections(attention, geometry)
        self.positions = attention_positions
        if attention_window is not None:
            self.window = min(attention_window, geometry.window or attention_window)

    def flops(self, length: int) -> float:
        return attention_flops(self.num_heads * self.head_dim, length, self.window)

    def state_bytes(self) -> int:
        return 0 if self.window is None else self.window * self._bytes

    def token_bytes(self) -> int:
        return self._bytes if self.window is None else 0

    @property
    def _bytes(self) -> int:
        """Of the keys and values of a token, in bfloat16."""
        return 2 * 2 * self.num_kv_heads * self.head_dim

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache=None,
        padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        documents: Documents | None = None,
        span: Span | None = None,
        **others,
    ) -> tuple[Tensor, None]:
        """Mixes hidden states (B,L,hidden) along L; arguments, results and errors as `TransMambaMixer.forward`."""
        told = self.told(attention_mask, padding_mask, seq_idx, documents, span)
        padding_mask, seq_idx, documents, span = told
        memory = self.memory(cache, others, packed=seq_idx is not None)
        self._check_packed(told, memory)
        q, k, v = self._project(hidden_states)
        q, k = self._placed(q, k, position_embeddings if self.positions else None)
        if span is not None:
            y = self._flex(q, k, v, span)
        elif seq_idx is not None:
            documents = documents or Documents(seq_idx.expand(len(q), -1))
            y = self._by_document(q, k, v, documents, documents.longest)
        else:
            y = self._rows(q, k, v, cast("KeysLayer | None", memory), padding_mask)
        return self.o_proj(y.to(hidden_states.dtype)), None

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, memory: KeysLayer | None, padding_mask: Tensor | None) -> Tensor:
        """What the heads read (B,L,H*P) where each row is one document, after what its memory holds."""
        batch, length = q.shape[:2]
        remember, memory = memory is not None, memory or KeysLayer()
        _, padding, pads = self._padding(memory, padding_mask, length)
        memory.hold_real(None if padding is None else ~padding[..., 0], batch, length)
        memory.hold(keys=k, values=v)
        assert memory.keys is not None and memory.values is not None
        y = self._attend(q, memory.keys, memory.values, memory.real)
        if remember:
            memory.advance(None, None, length, memory.tokens_after(length, pads))
            if self.window is not None:
                memory.keep(self.window - 1)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, positions={self.positions}"
