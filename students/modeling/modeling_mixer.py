"""What a mixer is: the base class of all that takes the place of self-attention, and what it is told.

The rest of the project asks a mixer what this class has, and never which one it is. This file travels with exported
checkpoints: it imports torch only.
"""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .cache_layers import StateLayer
from .errors import StudentError

# What decoders hand to self-attention besides, and what changes nothing in a mixer: positions come with the rotary
# embedding, documents are in seq_idx, the rest is about outputs and losses, or about kernels of attention.
UNREAD = {
    "past_key_values",  # the cache, as it was called before transformers 5.24,
    "layer_past",  # and by GPT-NeoX
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


@dataclass(frozen=True)
class Geometry:
    """The attention that a mixer replaces, in numbers: H query heads, K key/value heads, heads of P.

    A student's config keeps those of all layers, so that mixers are made without a teacher (`HybridConfig.geometry`).
    """

    attribute: str  # what a layer calls its attention: "self_attn"
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of q.k before softmax
    rotary_dim: int  # leading dimensions of a head that are rotated (0: none)
    window: int | None  # a query sees this many last tokens (None: all)
    norm_over: (
        str | None
    )  # what q_norm and k_norm norm: "head", one at a time, or "all" together (None: there are none)
    biases: tuple[str, ...]  # which of q_proj, k_proj, v_proj and o_proj have one

    @classmethod
    def of(cls, view: Any) -> "Geometry":
        """That of a teacher's `AttentionView`."""
        found = {name: getattr(view, name) for name in cls.__dataclass_fields__}
        return cls(**found)

    @classmethod
    def read(cls, attention: Any, attribute: str) -> "Geometry":
        """That of an attention module with separate projections: students made before their configs had it."""
        head_dim, config = attention.head_dim, attention.config
        layer_types = getattr(config, "layer_types", None)
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        if layer_types is not None and layer_types[attention.layer_idx] != "sliding_attention":
            window = None
        projections = ("q_proj", "k_proj", "v_proj", "o_proj")
        return cls(
            attribute,
            attention.q_proj.in_features,
            attention.q_proj.out_features // head_dim,
            attention.k_proj.out_features // head_dim,
            head_dim,
            float(attention.scaling),
            head_dim,
            window,
            "head" if hasattr(attention, "q_norm") else None,
            tuple(name for name in projections if getattr(attention, name).bias is not None),
        )


@dataclass(frozen=True)
class Heads:
    """How heads of rows are laid out anew: each `repeats` times, and each of them `factor` times as large.

    What a head gains is the head once more (`again`), or nothing: zeros.
    """

    count: int  # in the teacher
    size: int  # rows of a head in the teacher
    repeats: int = 1
    factor: int = 1
    again: bool = False

    def of(self, rows: Tensor) -> Tensor:
        """Rows (count * size, ...) laid out: (count * repeats * factor * size, ...)."""
        heads = rows.unflatten(0, (self.count, self.size)).repeat_interleave(self.repeats, 0)
        more = heads if self.again else torch.zeros_like(heads)
        return torch.cat((heads, *[more] * (self.factor - 1)), 1).flatten(0, 1)

    def __str__(self) -> str:
        size = f", {self.factor} times as large with {'itself' if self.again else 'zeros'}" if self.factor > 1 else ""
        return f"each head {self.repeats} times{size}"


@dataclass(frozen=True)
class Transfer:
    """One student tensor (or some of its rows) and where it comes from."""

    target: str  # parameter's name in the student: "model.layers.1.self_attn.in_proj.weight"
    operation: str  # "copy", "scale", "constant", "identity", "uniform", "mean", "low rank"
    source: str | None = None  # parameter's name in the teacher
    rows: tuple[int, int] | None = None  # of the target; None: all
    part: str = ""  # what those rows are: "C"
    value: float | tuple[float, ...] | None = None  # factor of scale, the constant, or the bound of uniform
    source_rows: Any = None  # of the source, `teachers.attention.Rows`; None: all
    heads: Heads | None = None  # how the source's rows, or for identity the target's channels, are laid out; None: so
    among: tuple["Transfer", ...] = ()  # of a mean: its own; of low rank: of the mean that is taken from the source

    @classmethod
    def taken(
        cls,
        target: str,
        view: Any,
        projection: str,
        parameter: str,
        *where,
        factor: float = 1.0,
        heads: Heads | None = None,
    ) -> "Transfer":
        """A parameter of one of a view's projections, times a factor; `where`: rows of the target, and their part."""
        held = getattr(view, projection)
        source = f"{view.name}.{held.name}.{parameter}"
        operation, value = ("copy", None) if factor == 1 else ("scale", factor)
        return replace(cls(target, operation, source, *where), value=value, source_rows=held.rows, heads=heads)

    def compute(self, teacher: dict[str, Tensor], like: Tensor) -> Tensor:
        """The new content of the target (or its rows), shaped as `like`.

        Raises:
            StudentError: the teacher has no such tensor, or it has another shape.
        """
        if self.operation == "constant":
            return torch.as_tensor(self.value, dtype=like.dtype).expand_as(like)
        if self.operation == "uniform":  # the same each time: what one plan makes is one student
            generator = torch.Generator().manual_seed(zlib.crc32(self.target.encode()))
            bound = cast("float", self.value)
            return torch.empty(like.shape).uniform_(-bound, bound, generator=generator).to(like.dtype)
        if self.operation == "identity":  # of a depthwise convolution (channels, 1, taps): the current token alone
            taps = torch.zeros_like(like, device="cpu")
            taps[..., -1] = cast("float", self.value)
            if self.heads is not None and self.heads.again:  # what a head gains is of the token before
                gained = taps.unflatten(0, (-1, self.heads.factor, self.heads.size))[:, 1:]
                gained.copy_(gained.roll(-1, -1))
            return taps
        if self.operation == "mean":
            return _mean(self.among, teacher).to(like.dtype)
        if self.operation == "low rank":
            # As the student holds the mean: what rounding takes from it, this takes up.
            mean = _mean(self.among, teacher).to(like)
            down, up = _truncated(self.taken_from(teacher), mean)
            rank = min(like.shape)
            return down[:rank] if self.part == "down" else up[:, :rank]
        tensor = self.taken_from(teacher)
        if tensor.shape != like.shape:
            raise StudentError(f"{self.source} is {tuple(tensor.shape)}, {self.target} needs {tuple(like.shape)}")
        return tensor * cast("float", self.value) if self.operation == "scale" else tensor

    def taken_from(self, teacher: dict[str, Tensor]) -> Tensor:
        """The rows of the source, laid out. Raises StudentError where the teacher has no such tensor."""
        tensor = None if self.source is None else teacher.get(self.source)
        if tensor is None:
            raise StudentError(f"{self.target} needs {self.source}, which the teacher does not have")
        tensor = tensor if self.source_rows is None else self.source_rows.of(tensor)
        return tensor if self.heads is None else self.heads.of(tensor)

    def describe(self) -> str:
        if self.operation == "mean":
            return ", ".join(str(one.source) for one in self.among)
        if self.operation == "low rank":
            return f"{self.source} less the mean"
        if self.operation in ("copy", "scale"):
            source = f"{self.source}" + (f"[{self.source_rows}]" if self.source_rows is not None else "")
            source += f", {self.heads}" if self.heads is not None else ""
            return source + (f" * {self.value:.4g}" if self.operation == "scale" else "")
        if self.operation == "identity":
            gained = ", in what a head gains the one before" if self.heads is not None and self.heads.again else ""
            return f"the current token * {self.value:.4g}{gained}"
        if self.operation == "uniform":
            return f"at random, {self.value:.4g} at most"
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        shown = [f"{value:.4g}" for value in (values if len(set(values)) > 1 else values[:1])]
        return " ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


def _mean(transfers: tuple[Transfer, ...], teacher: dict[str, Tensor]) -> Tensor:
    """Of what each takes from the teacher, in float32 at least."""
    taken = [one.taken_from(teacher) for one in transfers]
    return torch.stack([tensor.to(_precise(tensor)) for tensor in taken]).mean(0)


def _truncated(matrix: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Factors down and up of matrix - mean = up down, by its singular values, the largest first: of rank r their first
    r rows and columns are nearest to it. Rows of `down` have length 1, so that a term that is 0 can learn."""
    left, values, right = torch.linalg.svd(matrix.to(_precise(matrix)) - mean.to(_precise(mean)), full_matrices=False)
    return right, left * values


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class Form(NamedTuple):
    """One of the ways in which a mixer computes its output."""

    name: str  # in figures: "layer"
    trans_point: int | float | None = None  # which gives it; None where there is nothing to set
    unused: tuple[str, ...] = ()  # modules with weights that it does without


class Mixer(nn.Module):
    """What takes the place of self-attention in a layer: a module with the call signature of self-attention.

    `forward(hidden_states, position_embeddings, attention_mask, cache, padding_mask, seq_idx, **others)` gives the
    output (B,L,hidden) and None; see `FusedProjection.forward`. Its first lines are

        padding_mask, seq_idx, documents, span = self.told(attention_mask, padding_mask, seq_idx)
        memory = self.memory(cache, others, packed=seq_idx is not None)

    and with a memory it must call `memory.advance`, also where it keeps nothing.

    Args:
        attention: the self-attention it replaces, of the student's own tree, whose norms it may take over.
        geometry: of that attention.

    Attributes:
        exact: parameters that are held in float32 whatever the model is in, by name.
        remembers: the kind of memory it needs in a cache.
        matrix: beginnings of the names of parameters that the matrix between tokens depends on, and that `orient`
            trains; none where it has no such matrix, see `mixing`.
        copied: beginnings of the names of parameters that come from the teacher.
        strengths: with which a token may write; `calibrate` chooses one for each head. None where there is no choice.
        trans_point: at which token of a document attention ends, where that can be chosen: see `set_trans_point`.
        spanned: whether it takes attention, and so a `Span` of packed documents.
        apart: child modules whose parameters `forward` reads without calling the module.
        in_common: parameters that are the same in all layers of its kind, by name.
    """

    exact: ClassVar[tuple[str, ...]] = ()
    remembers: ClassVar[type[StateLayer]] = StateLayer
    apart: ClassVar[tuple[str, ...]] = ()
    matrix: ClassVar[tuple[str, ...]] = ()
    copied: ClassVar[tuple[str, ...]] = ()
    has_decay: ClassVar[bool] = False  # whether `calibrate` finds it a half-life and a scale
    strengths: ClassVar[tuple[float, ...]] = ()
    spanned: ClassVar[bool] = False
    in_common: tuple[str, ...] = ()
    trans_point: int | float = 0

    def __init__(self, attention: nn.Module, geometry: Geometry):
        super().__init__()
        self.layer_idx = cast("int", attention.layer_idx)
        self.geometry = geometry
        self.num_heads, self.num_kv_heads = geometry.num_heads, geometry.num_kv_heads
        self.head_dim = geometry.head_dim

    @property
    def out(self) -> nn.Linear:
        """The output projection, whatever the mixer calls it."""
        raise NotImplementedError

    def transfers(self, view: Any) -> list[Transfer]:
        """Where each of its parameters comes from, of a teacher's `AttentionView`; what it leaves out has the same name
        there.

        Raises:
            StudentError: it cannot take this attention's place.
        """
        raise NotImplementedError

    def drops(self, view: Any) -> list[str]:
        """Names in the view's attention, or beginnings of such, of what it does without by choice."""
        return []

    def forms(self) -> tuple[Form, ...]:
        """The ways in which it computes its output; `align` compares each with attention."""
        return (Form("layer"),)

    def flops(self, length: int) -> float:
        """Operations per token, forward, of what passes between tokens, over a document of `length` tokens."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Bytes of what it remembers of one sequence, however long: states in float32, keys and values in bfloat16."""
        raise NotImplementedError

    def token_bytes(self) -> int:
        """Bytes that it remembers of each token besides, however many there are: keys and values in bfloat16."""
        return 0

    @torch.no_grad()
    def start(self, generator: torch.Generator, spread: float) -> None:
        """Draws its parameters for training from scratch, where no attention has anything to hand over: convolutions
        and linear layers, all that there is by default. What is no linear layer's stays as transferred unless it is
        said here.

        Args:
            generator: of a CPU, where the mixer is then.
            spread: standard deviation of linear layers' weights, `out` included, which is scaled by depth afterwards.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=spread, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Conv1d):  # as PyTorch starts it
                bound = module.weight[0].numel() ** -0.5
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)

    def mixing(self, hidden_states: Tensor, position_embeddings: Any, seq_idx: Tensor) -> dict[str, Tensor]:
        """Where there is a `matrix`: that of its state-space form on hidden states (B,L,hidden) of packed documents
        (B,L), as the arguments dt, A, B, C and dt_bias of `kernels.matching.mixing_distance`."""
        raise NotImplementedError

    def set_trans_point(self, trans_point: int | float) -> None:
        """Chooses at which token of a document attention ends, where that can be chosen."""
        raise NotImplementedError

    def set_decay(self, half_life: Tensor, scale: Tensor) -> None:
        """Where `has_decay`: gives each head (H) this half-life in tokens, when no input moves it, and its output this
        scale: (H, P) where `scales_channels`, else (H, 1)."""
        raise NotImplementedError

    def set_strength(self, strength: Tensor) -> None:
        """Where it has `strengths`: how strongly a token of each head (H) writes, when no input moves it."""
        raise NotImplementedError

    def open_gate(self, row: Tensor) -> None:
        """Where its `gate_shut`: opens the gate by the inputs h themselves, of which row.h is about 1."""
        raise NotImplementedError

    def beside(self, hidden_states: Tensor, position_embeddings, seq_idx: Tensor, documents: Any) -> Tensor | None:
        """Where `has_decay`: what it adds to what its state gives, whatever decay and scale (B,L,H*P); None: nothing.
        Arguments as in `forward`."""
        return None

    def set_share(self, share: Tensor) -> None:
        """How much of what it has `beside` counts, by head (H), when no input moves it."""

    @property
    def attends(self) -> int | float:
        """Up to which token of a document it takes attention."""
        return self.trans_point

    @property
    def gate_shut(self) -> bool:
        """Where `has_decay`: whether it starts with a gate that `calibrate` has to open."""
        return False

    @property
    def scales_channels(self) -> bool:
        """Where `has_decay`: whether each channel of a head can have a scale of its own."""
        return False

    @contextmanager
    def at(self, trans_point: int | float | None) -> Iterator[None]:
        """The mixer at another TransPoint for a while; None: as it is."""
        own = self.trans_point
        if trans_point is not None:
            self.set_trans_point(trans_point)
        try:
            yield
        finally:
            if trans_point is not None:
                self.set_trans_point(own)

    def told(self, mask: Any, padding_mask: Tensor | None = None, seq_idx: Tensor | None = None, *more) -> MixerMask:
        """What is known of the tokens: what is in the place of the attention mask, or else the keywords."""
        return mask if isinstance(mask, MixerMask) else MixerMask(padding_mask, seq_idx, *more)

    def memory(self, cache: Any, others: dict, packed: bool) -> StateLayer | None:
        """This layer's memory in a cache, None without one.

        Args:
            others: the keywords besides.
            packed: whether documents are packed.

        Raises:
            TypeError: a keyword that is not known: it may ask for something that a mixer does not do, or be the cache
                by yet another name. Or the cache has another kind of memory for this layer.
        """
        for name in ("past_key_values", "layer_past"):
            cache = others.get(name) if cache is None else cache
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
        if type(memory).__name__ != self.remembers.__name__:  # by name: an export has these classes a second time
            raise TypeError(
                f"layer {self.layer_idx} is a mixer, but the cache holds a {type(memory).__name__} for it: "
                "pass `cache=model.new_cache()`, or none"
            )
        return memory

    def place(self, t: Tensor, norm: nn.Module | None, position_embeddings) -> Tensor:
        """Queries or keys (B,L,heads,P), normed and rotated."""
        if norm is not None:
            t = norm(t.flatten(2)).unflatten(-1, (-1, self.head_dim)) if self.geometry.norm_over == "all" else norm(t)
        return t if position_embeddings is None or not self.geometry.rotary_dim else rotate(t, position_embeddings)

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

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


def rotate(t: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the leading dimensions of t (B,L,heads,N), half-split layout."""
    cos, sin = (table.unsqueeze(2).to(t.dtype) for table in position_embeddings)
    turned, rest = t.split([cos.shape[-1], t.shape[-1] - cos.shape[-1]], dim=-1)
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)


def attention_flops(width: int, length: int | float, window: int | None) -> float:
    """Operations per token, forward, of causal attention over a document of `length` tokens.

    2 x 2 x width for each key that a token sees: its product with the query, and with the value. (length + 1) / 2 keys
    on average, fewer in a window. width: query heads times their size.
    """
    seen = min(window or length, length)
    keys = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
    return 4.0 * width * keys


def state_flops(heads: int, size: int, length: int, point: int | float) -> float:
    """Operations per token, forward, of a recurrence whose outputs are read after `point` tokens.

    Token by token (arXiv 2405.21060): 2 N P for each head to add a token to the state, and 2 N P to read it. Chunked
    algorithms take more products; they are an implementation's choice.
    """
    if point >= length or math.isinf(point):
        return 0.0
    return 2.0 * heads * size * (1 + (length - point) / length)
