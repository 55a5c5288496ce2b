"""The TransMamba mixer (arXiv 2503.24067): attention up to a TransPoint, then the state-space form, one set of weights.

The first T tokens of a document take attention, exactly the teacher's; later ones read a state, which the memory
converter computes from what attention kept. This file travels with exported checkpoints: it imports torch only.
"""

import math

import torch
from torch import Tensor, nn

from .cache_layers import KeysLayer, StateLayer, by_row
from .documents import Documents, Span
from .modeling_mixer import Form, Geometry, attention_flops
from .shared_projections import SharedProjections
from .state_space import PADDING_STEP, ssd_scan


def memory_converter(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *, dt_bias: Tensor | None = None) -> Tensor:
    """The state after T tokens, from the values and keys that attention read.

        h_T = sum_{i<=T} (prod_{j=i+1..T} a_j) dt_i v_i k_i^T        a_j = exp(dt_j A),  dt = softplus(dt + dt_bias)

    The memory converter of TransMamba (arXiv 2503.24067, equation 9) in Mamba-2's convention (arXiv 2405.21060): the
    paper's leaves dt out and lets the decay begin one token early, which is not the state that a scan over the same
    tokens has. Differentiable in every argument.

    Args:
        x: (B, T, Hx, P) values. Hx and Hb must each divide H, and consecutive heads share.
        dt: (B, T, H) step sizes, before the bias and the softplus. Padding has one where softplus is 0.
        A: (H,) negative decay rates.
        B: (B, T, Hb, N) keys.
        dt_bias: (H,) added to dt, or None.

    Returns:
        (B, H, P, N) float32 (float64 if x is float64).

    Raises:
        ValueError: a shape or a number of heads does not fit, or T = 0.
    """
    # Of the outputs, which nobody reads, one head of C is the fewest.
    return ssd_scan(x, dt, A, B, B[:, :, :1], dt_bias=dt_bias, return_final_state=True)[1]


class TransPointLayer(KeysLayer):
    """What one TransMamba layer remembers: keys and values up to its TransPoint, after it a state.

    Until the first row of a batch passes the TransPoint, it also holds what the memory converter will need; until the
    last row has reached it, it holds keys and values and a state. Then the state is all there is.
    """

    tensors = (*KeysLayer.tensors, "dt", "x", "B")
    can_be_static = True

    def __init__(self):
        super().__init__()
        self.dt: Tensor | None = None  # (B, columns, H) steps
        self.x: Tensor | None = None  # (B, columns, K, P) inputs and input maps of the state, where they are not
        self.B: Tensor | None = None  # values and keys
        self.trans_point: int | float | None = None

    @property
    def keeps_shape(self) -> bool:
        return self.keys is None and self.ssm_state is not None and super().keeps_shape

    def why_not_merged(self, other: StateLayer) -> str | None:
        if self.ssm_state is None or not self.keeps_shape or not other.keeps_shape:
            return "both have to be past its TransPoint"
        return super().why_not_merged(other)

    def settle(self, trans_point: int | float) -> None:
        """Fixes the TransPoint with the first tokens. Raises ValueError where it is another one later."""
        if self.trans_point not in (None, trans_point):
            raise ValueError(
                f"this cache was filled with TransPoint {self.trans_point} and the layer now has {trans_point}: "
                "start a new cache after set_trans_points"
            )
        self.trans_point = trans_point

    def drop(self, *names: str) -> None:
        for name in names:
            setattr(self, name, None)


class TransMambaMixer(SharedProjections):
    """A mixer with the call signature of self-attention. H query heads, K key/value heads, head_dim P = state N.

        q, k, v = q_proj(h), k_proj(h), v_proj(h), the first two normed and rotated as the teacher does
        y_t = softmax attention over tokens 1..t, in the teacher's window                    for t <= trans_point
        S_t = exp(dt_t A) S_{t-1} + dt_t v_t k_t^T,  y_t = scale S_t q_t + D v_t             for t > trans_point
        out = o_proj(y)

    With trans_point = inf it is the teacher's attention, with 0 a Mamba-2 mixer. t counts from the start of a document,
    padding left out. The options concern the state-space form alone, and attention is the teacher's in any case.

    Args: see `SharedProjections`.
    """

    remembers = TransPointLayer
    matrix = ("dt_proj.", "conv1d.", "dt_bias", "A_log")  # not what attention has too

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        conv_kernel: int = 0,
        conv_activation: str | None = None,
        gate: bool = False,
        norm: bool = False,
        rope: bool = True,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__(attention, geometry, conv_kernel, conv_activation, gate, norm, rope, qk_norm, norm_eps)
        self.trans_point: int | float = math.inf
        self.point = None

    def set_trans_point(self, trans_point: int | float) -> None:
        """Chooses at which token of a document attention ends."""
        self.trans_point = trans_point
        if self.point is not None and trans_point < math.inf:
            self.point.fill_(trans_point)  # whatever was recorded with it goes on from there

    def mixing(self, hidden_states: Tensor, position_embeddings, seq_idx: Tensor) -> dict[str, Tensor]:
        q, k, v = self._project(hidden_states)
        C, B = self._placed(q, k, position_embeddings)
        if not self.shared:
            _, B, C, _ = self._inputs(q, k, v, position_embeddings, seq_idx=seq_idx)
        A, dt = -torch.exp(self.A_log.float()), self.dt_proj(hidden_states)
        return {"dt": dt, "A": A, "B": B, "C": C * self.scale, "dt_bias": self.dt_bias}

    def forms(self) -> tuple[Form, ...]:
        return Form("layer", 0), Form("attention", math.inf, unused=("dt_proj", "z_proj"))

    def flops(self, length: int) -> float:
        point = min(self.trans_point, length)
        attention = attention_flops(self.num_heads * self.head_dim, point, self.window) * point / length if point else 0
        return attention + super().flops(length)

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
        """Mixes hidden states (B,L,hidden) along L.

        Args:
            position_embeddings: cos and sin (B or 1, L, R); None for a teacher without rotary embedding.
            attention_mask: a `MixerMask`, in place of the keywords of its names; another one is not read.
            cache: a `HybridCache`, updated; `past_key_values` is the same.
            padding_mask: (B, at least L), 1 for tokens and 0 for padding; its last L columns belong to these tokens.
            seq_idx: (B or 1, L) document index of packed sequences, without a cache or padding.
            documents: those of seq_idx, if they are already known.
            span: this mixer's in the documents of seq_idx, for attention by flex_attention.

        Returns:
            The output (B,L,hidden), and None where attention has its weights.

        Raises:
            TypeError: a keyword that is not known; or the cache is one without a memory for this layer.
            ValueError: the cache was filled with another TransPoint; documents are packed and there is a cache; or
                they come without seq_idx.
        """
        told = self.told(attention_mask, padding_mask, seq_idx, documents, span)
        padding_mask, seq_idx, documents, span = told
        batch = hidden_states.shape[0]
        memory = self.memory(cache, others, packed=seq_idx is not None)
        self._check_packed(told, memory)
        if seq_idx is None:
            y = self._rows(hidden_states, position_embeddings, memory, padding_mask)
        elif span is not None:
            y = self._spanned(hidden_states, position_embeddings, seq_idx.expand(batch, -1), span)
        else:
            seq_idx = seq_idx.expand(batch, -1)
            documents = documents or Documents(seq_idx)
            if documents.count > batch:
                y = self._packed(hidden_states, position_embeddings, seq_idx, documents)
            else:
                y = self._rows(hidden_states, position_embeddings, memory, padding_mask)
        return self.o_proj(y.to(hidden_states.dtype)), None

    def _rows(self, hidden: Tensor, position_embeddings, memory, padding_mask: Tensor | None) -> Tensor:
        """What the heads read (B,L,H*P) where each row is one document, after what its memory holds.

        Columns before `first` take attention in every row, from `last` on the state in every row. Those in between,
        which only padded batches have, get both, and each row takes its own.
        """
        length, T = hidden.shape[1], self.trans_point
        remember = memory is not None
        memory = memory if remember else TransPointLayer()
        memory.settle(T)
        stepping, padding, pads = self._padding(memory, padding_mask, length)
        before, pads = by_row(memory.tokens, pads)
        after = [seen + length - pad for seen, pad in zip(before, pads, strict=True)]
        finished = remember and min(after) >= T
        first = last = length
        if convert := finished or max(after) > T or memory.ssm_state is not None:
            left: list[int] = [max(T - seen, 0) for seen in before]  # type: ignore[misc]  # or inf, which length cuts off
            # A state goes on with every token, though the rows that called for it may be gone (`batch_select_indices`).
            first = min(length, *left) if memory.ssm_state is None else 0
            last = min(length, max(some and some + pad for some, pad in zip(left, pads, strict=True)))

        q, k, v = self._project(hidden)
        queries, keys = self._placed(q, k, position_embeddings)
        attended = None
        if last > 0:
            memory.hold_real(None if padding is None else ~padding[:, :last, 0], batch=len(hidden), columns=last)
            memory.hold(keys=keys[:, :last], values=v[:, :last])
            attended = self._attend(queries[:, :last], memory.keys, memory.values, memory.real)
        if not convert and (T == math.inf or not remember):
            memory.advance(None, None, length, after)
            if self.window is not None:
                memory.keep(self.window - 1)
            return attended  # type: ignore[return-value]  # of all columns

        dt = self.dt_proj(hidden)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)
        if memory.mergeable:
            memory.decay_by(self.log_decay(dt))
        x, B, C, tail = v, keys, queries, None
        if not self.shared:
            x, B, C, tail = self._inputs(q, k, v, position_embeddings, memory if remember else None, stepping, padding)
        state = memory.ssm_state
        if state is None and first > 0:
            memory.hold(dt=dt[:, :first], **({} if self.shared else {"x": x[:, :first], "B": B[:, :first]}))
        if not convert:
            memory.advance(tail, None, length, after)
            return attended  # type: ignore[return-value]  # of all columns

        if memory.dt is not None:
            columns = memory.dt.shape[1]
            kept = (memory.values[:, :columns], memory.keys[:, :columns]) if self.shared else (memory.x, memory.B)
            A = -torch.exp(self.A_log.float())
            state = memory_converter(kept[0], memory.dt, A, kept[1], dt_bias=self.dt_bias)
        read = None
        if first < length:
            x, dt, B, C = (t[:, first:] for t in (x, dt, B, C))
            read, state = self._recur(x, dt, B, C * self.scale, state, stepping and state is not None, remember)
            read = self._gate_and_norm(read.flatten(2), None if self.z_proj is None else self.z_proj(hidden[:, first:]))
        if first < last:
            attends = (memory.real.cumsum(1)[:, -last:] - 1 < T)[:, first:, None]
        memory.drop("dt", "x", "B", *(("keys", "values", "real") if finished else ()))
        memory.advance(tail, state, length, after)
        if read is None or attended is None:
            return attended if read is None else read  # type: ignore[return-value]  # there is one of them
        if first < last:
            both = torch.where(attends, attended[:, first:], read[:, : last - first])
            return torch.cat((attended[:, :first], both, read[:, last - first :]), 1)
        return torch.cat((attended, read), 1)

    def _packed(self, hidden: Tensor, position_embeddings, seq_idx: Tensor, documents: Documents) -> Tensor:
        """What the heads read (B,L,H*P) where rows hold several documents: attention over the prefix of each, and one
        scan over all tokens, whose outputs past a TransPoint do not depend on it."""
        T = self.trans_point
        q, k, v = self._project(hidden)
        queries, keys = self._placed(q, k, position_embeddings)
        attended = None
        if T > 0:
            attended = self._by_document(queries, keys, v, documents, int(min(T, documents.longest)))
        if T >= documents.longest:
            return attended  # type: ignore[return-value]  # T > 0
        read = self._read(hidden, (q, k, v), (queries, keys), position_embeddings, seq_idx)
        return read if attended is None else torch.where(documents.position.unsqueeze(-1) < T, attended, read)

    def _spanned(self, hidden: Tensor, position_embeddings, seq_idx: Tensor, span: Span) -> Tensor:
        """What `_packed` computes, by the span."""
        q, k, v = self._project(hidden)
        queries, keys = self._placed(q, k, position_embeddings)
        attended = None if span.mask is None else self._flex(queries, keys, v, span)
        if span.point is None:
            return attended  # type: ignore[return-value]  # T > 0
        read = self._read(hidden, (q, k, v), (queries, keys), position_embeddings, seq_idx)
        return read if attended is None else torch.where(span.position.unsqueeze(-1) < span.point, attended, read)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trans_point={self.trans_point}, window={self.window}"
