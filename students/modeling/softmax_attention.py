"""Softmax attention as a mixer: the teacher's own, which may be narrowed to a window or go without positions.

It is what a layer plan makes of kept attention, as in published hybrids. This file travels with exported checkpoints:
it imports torch only.
"""

import math
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_layers import KeysLayer
from .documents import Documents, Span
from .modeling_mixer import Geometry, Transfer, attention_flops
from .projections import PROJECTIONS, Projections


class SharedLinear(nn.Module):
    """A linear map whose matrix W several layers have in common, with a low-rank term (LoRA, arXiv 2106.09685) and a
    bias of this layer's own: x (W + up down)^T + bias.

    rank: of the term, at most that of a matrix; 0: there is none.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int):
        super().__init__()
        rank = min(rank, in_features, out_features)
        self.weight = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.down = nn.Linear(in_features, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, out_features, bias=False) if rank else None
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = F.linear(inputs, self.weight, self.bias)
        return outputs if self.up is None or self.down is None else outputs + self.up(self.down(inputs))


class SoftmaxMixer(Projections):
    """Attention with the call signature of self-attention. With the defaults it is the teacher's.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it takes over.
        geometry: of that attention.
        attention_window: how many last tokens a query sees, and no more than the teacher's does; None: as many.
        attention_positions: whether queries and keys take the teacher's rotary embedding.
        attention_shared_rank: of the low-rank terms of this layer's own, where all layers of this kind have the
            matrices of their projections in common (Zamba 2, arXiv 2411.15242); 0: they have no such terms (Zamba,
            arXiv 2405.16712); None: each layer has its own matrices. Biases and norms are its own in any case.
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
        attention_shared_rank: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry)
        if attention_shared_rank is None:
            self.add_projections(attention, geometry)
        else:
            self.add_projections(attention, geometry, partial(SharedLinear, rank=attention_shared_rank))
            self.in_common = tuple(f"{name}.weight" for name in PROJECTIONS)
        self.positions = attention_positions
        if attention_window is not None:
            self.window = min(attention_window, geometry.window or attention_window)

    def transfers(self, view) -> list[Transfer]:
        found = []
        for transfer in super().transfers(view):
            name = transfer.target.removeprefix(f"{view.name}.")
            if name not in self.in_common:
                found.append(transfer)
                continue
            found.append(replace(transfer, operation="mean", value=None))
            linear = self.get_submodule(name.removesuffix(".weight"))
            for part in ("down", "up") if linear.up is not None else ():
                target = transfer.target.removesuffix("weight") + f"{part}.weight"
                found.append(replace(transfer, target=target, operation="low rank", part=part, value=None))
        return found

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        """What layers have in common is drawn by each of them in turn; low-rank terms start at zero, as in LoRA."""
        super().start(generator, spread)
        for module in self.modules():
            if isinstance(module, SharedLinear):
                module.weight.normal_(std=spread, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
                if module.up is not None:
                    module.up.weight.zero_()

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
