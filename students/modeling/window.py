"""Sliding-window attention and a state side by side in one layer, one set of weights.

The last tokens, and the first few as sinks (arXiv 2309.17453), are read by the teacher's own softmax attention; the
rest of the past by a state, as in linear attention with a window (LoLCATs, arXiv 2410.10254; hybrid heads, Hymba,
arXiv 2411.13676). A student that leans on the window alone learns no state (arXiv 2510.05901), so the window can be
left out at random in training. This file travels with exported checkpoints: it imports torch only.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .cache_layers import StateLayer
from .documents import Documents, Span, token_position
from .modeling_mixer import Geometry, Transfer, attention_flops
from .shared_projections import SharedProjections
from .state_space import PADDING_STEP, WidenedLinear

MIXED = (0.01, 0.99)  # of twice the window's part: what a sigmoid reaches without having to grow large
BLOCK = 1024  # queries that attend at once: what they see is masked, and masks of whole sequences would be quadratic


class Keys(NamedTuple):
    """Keys and values (B, columns, K, P), and where each column is in its row (B, columns), -1 for padding."""

    keys: Tensor
    values: Tensor
    position: Tensor

    def since(self, column: int, sinks: Tensor) -> "Keys":
        """The sinks before a column, and all from it on. sinks: `first_columns`."""
        # A row may begin behind all columns, and has no sinks then.
        before = self.taken(sinks.clamp(max=self.position.shape[1] - 1))
        before = before._replace(position=before.position.masked_fill(sinks >= column, -1))
        return Keys(*(torch.cat((first, rest[:, column:]), 1) for first, rest in zip(before, self, strict=True)))

    def taken(self, columns: Tensor) -> "Keys":
        """These columns (B, any number) of each row."""
        rows = columns[:, :, None, None].expand(-1, -1, *self.keys.shape[2:])
        return Keys(self.keys.gather(1, rows), self.values.gather(1, rows), self.position.gather(1, columns))

    def first_columns(self, sinks: int) -> Tensor:
        """(B, at most `sinks`) columns of the first tokens of each row; where there are fewer, a column of none."""
        beyond = self.position.shape[1] + sinks
        return self.position.masked_fill((self.position < 0) | (self.position >= sinks), beyond).argsort(1)[:, :sinks]


class WindowLayer(StateLayer):
    """What one layer remembers: a state, and the keys and values of the sinks and of the window.

    These are in as many columns from the first token on: a sink in that of its own number, any other token in the place
    of the one that has left the window for it.
    """

    tensors = (*StateLayer.tensors, "keys", "values", "position")

    def __init__(self):
        super().__init__()
        self.keys: Tensor | None = None  # (B, sinks + window, K, P)
        self.values: Tensor | None = None
        self.position: Tensor | None = None  # (B, sinks + window), -1 where there is no token yet

    def why_not_merged(self, other: StateLayer) -> str | None:
        return "its window and sinks are those of one text: read the second text after the first"

    def with_new(self, keys: Tensor, values: Tensor, real: Tensor | None) -> Keys:
        """What it holds, in the order of the text, and new columns behind. real: (B, new columns), false for padding;
        None: all are."""
        batch, columns = keys.shape[:2]
        held = self._held(keys.device)
        seen = 0 if held is None else held.position.amax(1, keepdim=True) + 1
        if real is None:
            position = (seen + torch.arange(columns, device=keys.device)).expand(batch, -1)
        else:
            position = (seen + real.cumsum(1) - 1).masked_fill(~real, -1)
        new = Keys(keys, values, position)
        if held is None:
            return new
        ordered = held.taken(held.position.argsort(1))
        return Keys(*(torch.cat((old, more), 1) for old, more in zip(ordered, new, strict=True)))

    def keep(self, read: Keys, window: int, sinks: int, gap: int) -> None:
        """Holds of columns in the order of the text what later queries will see. gap: as many at most are padding
        between tokens."""
        if (first := read.position.shape[1] - window - gap) > sinks:
            read = read.since(first, read.first_columns(sinks))
        position, columns = read.position, sinks + window
        live = (position >= 0) & _near(position.amax(1, keepdim=True), position, window, sinks)[:, 0]
        column = torch.where(live, self._column(position, window, sinks), columns)
        placed = []
        for t, empty in zip(read, (0, 0, -1), strict=True):
            into = t.new_full((len(t), columns + 1, *t.shape[2:]), empty)  # the last one takes what is not held
            placed.append(into.scatter(1, _over(t, column), t)[:, :columns])
        self._hold(Keys(*(t.contiguous() for t in placed)))

    def step(self, keys: Tensor, values: Tensor, window: int, sinks: int) -> Keys:
        """Takes one more token of each row, (B,1,K,P), and gives what it holds then."""
        held = self._held(keys.device)
        assert held is not None  # a step comes after the first tokens
        position = held.position.amax(1, keepdim=True) + 1
        column = self._column(position, window, sinks)
        written = Keys(
            *(
                t.scatter(1, _over(new, column), new.to(t.dtype))
                for t, new in zip(held, (keys, values, position), strict=True)
            )
        )
        self._hold(written)
        return written

    def _column(self, position: Tensor, window: int, sinks: int) -> Tensor:
        return torch.where(position < sinks, position, sinks + (position - sinks) % window)

    def _hold(self, held: Keys) -> None:
        for name, t in held._asdict().items():
            self._put(name, t)

    def _held(self, device: torch.device) -> Keys | None:
        """What it holds, on this device from now on."""
        if self.keys is None or self.values is None or self.position is None:
            return None
        if self.keys.device != device:
            self.keys, self.values, self.position = (t.to(device) for t in (self.keys, self.values, self.position))
        return Keys(self.keys, self.values, self.position)


class WindowMixer(SharedProjections):
    """A mixer with the call signature of self-attention. H query heads, K key/value heads, head_dim P.

        q, k, v = q_proj(h), k_proj(h), v_proj(h), the first two normed and rotated as the teacher does
        w_t = softmax attention over tokens t-window+1..t and 1..sinks
        r_t = what queries read from a state that keys and values were written to: each kind's own
        y_t = 2 sigmoid(mix_proj(h_t) + mix_bias) w_t + norm(r_t * SiLU(z_t))
        out = o_proj(y)

    What stands before w_t, one number for each head, starts at 1; `calibrate` fits it together with the state's decay
    and scale. With a window as long as the document, and a state without steps, this is the teacher's attention, unless
    that has a window, which sinks reach beyond.

    The state's keys and queries, B and C, are k and q times scale, or of both a feature map, softmax(x + Mx, -x - Mx)
    of x = sqrt(scale) k or q with a learned M for each head (Hedgehog, arXiv 2402.04347), which sets keys apart as
    softmax does: they then have 2 P numbers. Unless rope is off, the map is of rotated keys, and positions count, not
    only distances.

    Args:
        window: how many last tokens attention sees, and no more than the teacher's does.
        sinks: how many first tokens of a document attention sees, too.
        window_drop: how often, in training, this layer goes without its window for a sequence.
        feature_map: "softmax" or None.
        others: of the state, see `SharedProjections`.
    """

    remembers = WindowLayer

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        *,
        window: int = 64,
        sinks: int = 4,
        window_drop: float = 0.0,
        feature_map: str | None = "softmax",
        conv_kernel: int = 0,
        conv_activation: str | None = None,
        gate: bool = True,
        norm: bool = True,
        rope: bool = True,
        qk_norm: bool = True,
        norm_eps: float = 1e-5,
        skip: bool = True,
    ):
        super().__init__(attention, geometry, conv_kernel, conv_activation, gate, norm, rope, qk_norm, norm_eps, skip)
        self.window: int = min(window, geometry.window or window)
        self.sinks, self.window_drop = sinks, window_drop
        self.q_map = self.k_map = None
        if feature_map == "softmax":
            self.state_factor = 2
            square = (self.head_dim, self.head_dim)
            self.q_map = nn.Parameter(torch.zeros(self.num_heads, *square))
            self.k_map = nn.Parameter(torch.zeros(self.num_kv_heads, *square))
        self.mix_proj = WidenedLinear(geometry.hidden_size, self.num_heads, bias=False)
        self.mix_bias = nn.Parameter(torch.zeros(self.num_heads))

    @property
    def attends(self) -> float:
        return math.inf

    def transfers(self, view) -> list[Transfer]:
        own = ["mix_proj.weight", "mix_bias", *(["q_map", "k_map"] if self.q_map is not None else [])]
        return super().transfers(view) + [Transfer(f"{view.name}.{name}", "constant", value=0.0) for name in own]

    def features(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        if self.k_map is None or self.q_map is None:
            return super().features(B, C)
        return tuple(self._mapped(t * self.scale**0.5, by) for t, by in ((B, self.k_map), (C, self.q_map)))  # type: ignore[return-value]

    def _mapped(self, t: Tensor, by: Tensor) -> Tensor:
        t = t + torch.einsum("blhp,hpn->blhn", t, by.to(t.dtype))
        return torch.cat((t, -t), -1).softmax(-1, dtype=torch.float32).to(t.dtype)

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        """What the state gives starts as large as values are, whatever it holds: as 1 it would drown the window."""
        super().start(generator, spread)
        if self.norm is not None:
            self.norm.get_parameter("weight").fill_(spread * self.geometry.hidden_size**0.5)

    @torch.no_grad()
    def set_share(self, share: Tensor) -> None:
        self.mix_bias.copy_((share / 2).clamp(*MIXED).logit())

    def flops(self, length: int) -> float:
        width = self.num_heads * self.head_dim
        return attention_flops(width, length, min(length, self.window + self.sinks)) + super().flops(length)

    def state_bytes(self) -> int:
        return super().state_bytes() + 2 * 2 * (self.window + self.sinks) * self.num_kv_heads * self.head_dim

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
        batch, length, _ = hidden_states.shape
        memory = self.memory(cache, others, packed=seq_idx is not None)
        self._check_packed(told, memory)
        q, k, v = self._project(hidden_states)
        queries, keys = self._placed(q, k, position_embeddings)
        if seq_idx is not None:
            seq_idx = seq_idx.expand(batch, -1)
            attended = self._packed(queries, keys, v, seq_idx, documents, span)
            read = self._read(hidden_states, (q, k, v), (queries, keys), position_embeddings, seq_idx)
            return self.o_proj(self._mix(hidden_states, attended, read).to(hidden_states.dtype)), None

        remember = memory is not None
        layer = WindowLayer() if memory is None else cast("WindowLayer", memory)
        stepping, padding, pads = self._padding(layer, padding_mask, length)
        if stepping:
            attended = self._step(queries, layer.step(keys, v, self.window, self.sinks))
        else:
            gap = max(pads)  # it may also stand before the first token
            columns = layer.with_new(keys, v, None if padding is None else ~padding[..., 0])
            attended = self._rows(queries, columns, gap)
            if remember:
                layer.keep(columns, self.window, self.sinks, gap)
        dt = self.steps(hidden_states)
        dt = dt if padding is None else dt.masked_fill(padding, PADDING_STEP)
        x, B, C, tail = v, keys, queries, None
        if not self.shared:
            x, B, C, tail = self._inputs(q, k, v, position_embeddings, memory, stepping, padding)
        if layer.mergeable:
            layer.decay_by(self.log_decay(dt))
        B, C = self.features(B, C)
        read, state = self._recur(x, dt, B, C, layer.ssm_state, stepping, remember)
        if remember:
            layer.advance(tail, state, length, layer.tokens_after(length, pads))
        z = None if self.z_proj is None else self.z_proj(hidden_states)
        y = self._mix(hidden_states, attended, self._gate_and_norm(read.flatten(2), z))
        return self.o_proj(y.to(hidden_states.dtype)), None

    def beside(self, hidden_states: Tensor, position_embeddings, seq_idx: Tensor, documents: Documents) -> Tensor:
        q, k, v = self._project(hidden_states)
        queries, keys = self._placed(q, k, position_embeddings)
        return self._mix(hidden_states, self._packed(queries, keys, v, seq_idx, documents, None))

    def _mix(self, hidden: Tensor, attended: Tensor, read: Tensor | None = None) -> Tensor:
        """What goes into the output projection (B,L,H*P), of what attention and the state give."""
        share = 2 * torch.sigmoid(self.mix_proj(hidden) + self.mix_bias)
        if self.training and self.window_drop:
            share = share * (torch.rand(len(share), 1, 1, device=share.device) >= self.window_drop)
        y = (attended.unflatten(-1, (self.num_heads, -1)) * share.unsqueeze(-1)).flatten(2)
        return y if read is None else y + read

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, seq_idx: Tensor, documents, span: Span | None) -> Tensor:
        """Attention (B,L,H*P) within packed documents."""
        if span is None:
            position = token_position(seq_idx) if documents is None else documents.position
            column, parts = torch.arange(seq_idx.shape[1], device=seq_idx.device), []
            for begin in range(0, len(column), BLOCK):
                own, before = slice(begin, begin + BLOCK), slice(begin + BLOCK)
                seen = (seq_idx[:, own, None] == seq_idx[:, None, before]) & (column[before] <= column[own, None])
                seen &= _near(position[:, own], position[:, before], self.window, self.sinks)
                parts.append(self._softmax(q[:, own], k[:, before], v[:, before], seen[:, None]))
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return self._flex(q, k, v, span)

    def _rows(self, q: Tensor, held: Keys, gap: int) -> Tensor:
        """Attention (B,Q,H*P) of queries (B,Q,H,P), which are the last columns of `held`, one document in each row;
        `gap` as in `WindowLayer.keep`."""
        queries, columns = q.shape[1], held.position.shape[1]
        sinks, parts = None, []
        for begin in range(0, queries, BLOCK):
            end = min(begin + BLOCK, queries)
            before = columns - queries + begin - (self.window - 1) - gap
            seen = Keys(*(t[:, : columns - queries + end] for t in held))
            if before > self.sinks:
                sinks = held.first_columns(self.sinks) if sinks is None else sinks
                seen = seen.since(before, sinks)
            own = held.position[:, columns - queries + begin : columns - queries + end]
            mask = _near(own, seen.position, self.window, self.sinks) & (seen.position[:, None, :] <= own[:, :, None])
            mask &= seen.position[:, None, :] >= 0
            # Padding sees itself, as a softmax over nothing would be no number.
            alone = torch.arange(seen.position.shape[1] - (end - begin), seen.position.shape[1], device=q.device)
            mask[:, torch.arange(end - begin, device=q.device), alone] = True
            parts.append(self._softmax(q[:, begin:end], seen.keys, seen.values, mask[:, None]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _step(self, q: Tensor, held: Keys) -> Tensor:
        """Attention (B,1,H*P) of the queries (B,1,H,P) of the last token of each row, to all that is held."""
        return self._one(q, held.keys, held.values, (held.position >= 0)[:, None, None])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, sinks={self.sinks}"


def _near(query: Tensor, key: Tensor, window: int, sinks: int) -> Tensor:
    """(B,Q,S): which keys are in the window or sinks, by positions (B,Q) and (B,S)."""
    key = key[:, None, :]
    return (query[:, :, None] - key < window) | (key < sinks)


def _over(t: Tensor, columns: Tensor) -> Tensor:
    """An index of columns (B, any number) in the shape of t, which has as many."""
    return columns.view(*columns.shape, *[1] * (t.ndim - 2)).expand_as(t)
