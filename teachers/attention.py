"""One view of a teacher's attention, whatever its family: projections, norms, heads, scale, rotary, window.

A view is read off the modules themselves, by the reader of its family (`families.READERS`) or the one below, and then
*checked*: the attention it describes is computed in plain PyTorch on random input and must equal what the module
computes. So a family that does something this file does not know (soft-capping, sinks, another rotary layout) is
refused rather than converted wrongly, and a reader that is wrong is found out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import TeacherError

_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}


class Rows(NamedTuple):
    """Rows of a matrix: `length` of them from `start` on, and again after `every`, `times` times in all."""

    start: int
    length: int
    every: int = 0
    times: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor (rows, ...)."""
        if self.times == 1:
            return tensor[self.start : self.start + self.length]
        first = self.start + self.every * torch.arange(self.times, device=tensor.device)
        return tensor[(first[:, None] + torch.arange(self.length, device=tensor.device)).flatten()]

    def __str__(self) -> str:
        text = f"{self.start}:{self.start + self.length}"
        return text if self.times == 1 else f"{text} of each {self.every}"


@dataclass(frozen=True)
class Projection:
    """Where a projection lies: a linear layer, or some rows of one that holds several."""

    name: str  # of the linear layer in the attention: "q_proj"
    linear: nn.Linear
    rows: Rows | None = None  # None: all

    @property
    def weight(self) -> Tensor:
        return self._part(self.linear.weight)

    @property
    def bias(self) -> Tensor | None:
        return None if self.linear.bias is None else self._part(self.linear.bias)

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features if self.rows is None else self.rows.length * self.rows.times

    def __call__(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else self.rows.of(tensor)


@dataclass(frozen=True)
class AttentionView:
    """The attention of one layer. H query heads, K key/value heads (query head h reads head h // (H/K)), head_dim P."""

    layer: int
    name: str  # of the module in the model: "model.layers.3.self_attn"
    module: nn.Module
    q_proj: Projection  # (H*P, hidden)
    k_proj: Projection  # (K*P, hidden)
    v_proj: Projection  # (K*P, hidden)
    o_proj: Projection  # (hidden, H*P)
    q_norm: nn.Module | None  # after the projection and before rotary
    k_norm: nn.Module | None
    norm_over: str | None  # what of it they norm: "head", one at a time, or "all" together
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of q.k before softmax
    rotary_dim: int  # how many leading dimensions of a head are rotated (0: none)
    window: int | None  # a query sees this many last tokens, itself included (None: all)
    layer_type: str | None = None  # of the rotary embedding, where the decoder's has several

    @property
    def attribute(self) -> str:
        """What its layer calls it: "self_attn"."""
        return self.name.rpartition(".")[2]

    @property
    def biases(self) -> tuple[str, ...]:
        """Which of the four projections have a bias."""
        return tuple(name for name in sorted(_PARTS) if getattr(self, name).bias is not None)

    def project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,L,H,P), keys and values (B,L,K,P), normed and rotated, of hidden states (B,L,hidden)."""
        split = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.norm_over == "all":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]  # there are both
        q, k, v = (t.view(split) for t in (q, k, v))
        if self.norm_over == "head":
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]  # there are both
        if self.rotary_dim:
            q, k = (rotate(t, position_embeddings) for t in (q, k))  # type: ignore[arg-type]  # there are some
        return q, k, v

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Causal softmax attention weights (B,H,L,L), in float32, of queries (B,L,H,P) and keys (B,L,K,P)."""
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        scores = torch.einsum("bthp,bshp->bhts", q, k).float() * self.scale
        return scores.masked_fill(self.unseen(q.shape[1], q.device), -torch.inf).softmax(dim=-1)

    def unseen(self, length: int, device: torch.device | str) -> Tensor:
        """(L,L) bool: True where query t (row) does not see key s (column): the future, and past the window."""
        t = torch.arange(length, device=device)
        distance = t[:, None] - t[None, :]
        return (distance < 0) | (distance >= (self.window or length))

    def attend(self, weights: Tensor, v: Tensor) -> Tensor:
        """What each head reads, (B,L,H,P), before o_proj: weights (B,H,L,L) applied to values (B,L,K,P)."""
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        return torch.einsum("bhts,bshp->bthp", weights.to(v.dtype), v)


def rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of x (B,L,heads,P), half-split layout as transformers has it.

    `position_embeddings`: cos and sin, each (B or 1, L, R); the leading R of the P dimensions are rotated.
    """
    cos, sin = (t.unsqueeze(2).to(x.dtype) for t in position_embeddings)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, in order. Raises TeacherError if they cannot be told."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise TeacherError(f"{type(model).__name__} is not understood: its decoder has no list `layers`")
    return layers


def attention_view(
    model: PreTrainedModel, check: bool = True, layers: Collection[int] | None = None
) -> list[AttentionView]:
    """A view of every layer's attention, each checked against its module (unless that is on the meta device).

    Args:
        check: False where these views were checked before.
        layers: which layers' alone; None: all.

    Raises:
        TeacherError: a layer's attention has a part, or computes something, that is not understood; names it.
    """
    from .families import ATTENTION, READERS  # which read with what is here

    names = {id(module): name for name, module in model.named_modules()}
    config = model.config.get_text_config(decoder=True)
    # A student has its teacher's attention.
    read = READERS.get(getattr(config, "base_model_type", config.model_type), read_attention)
    views = []
    for index, layer in enumerate(decoder_layers(model)):
        if layers is not None and index not in layers:
            continue
        module = next((found for name in ATTENTION if (found := getattr(layer, name, None)) is not None), None)
        if module is None:
            raise TeacherError(
                f"layer {index} ({type(layer).__name__}) is not understood: it has no `{'` or `'.join(ATTENTION)}`"
            )
        try:
            view = read(model, index, module, names[id(module)])
            if check and view.o_proj.weight.device.type != "meta":
                _check(model, view)  # of each layer: some families leave out the rotary embedding in every fourth
        except TeacherError:
            raise
        except Exception as error:  # what a family asks for or lacks may be anything
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise TeacherError(
                f"layer {index} ({type(module).__name__}) is not understood: seen as other families' "
                f"attention, it fails with {what}"
            ) from error
        views.append(view)
    return views


def read_attention(
    model: PreTrainedModel, index: int, module: nn.Module, name: str, **parts: Projection
) -> AttentionView:
    """The view of a layer's attention, not checked against it yet.

    Most families' attention has q_proj, k_proj, v_proj and o_proj, perhaps q_norm and k_norm, and states head_dim and
    scaling.

    Args:
        name: of the module in the model.
        parts: q_proj, k_proj, v_proj and o_proj, where these lie elsewhere.

    Raises:
        TeacherError: the module lacks one of these, has another part, or shapes that do not fit.
    """
    what = f"{name} ({type(module).__name__}) is not understood: "
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    taken = {part.name for part in parts.values()} | (set() if parts else _PARTS)
    if missing := sorted(taken - children.keys()):
        raise TeacherError(f"{what}it lacks {', '.join(missing)} and has {', '.join(sorted(children)) or 'no parts'}")
    strangers = sorted(children.keys() - taken - _NORMS) + sorted(n for n, _ in module.named_parameters(recurse=False))
    if strangers:
        raise TeacherError(f"{what}no place for its {', '.join(strangers)}")
    # On the small inputs of the numeric check a cap makes no difference.
    if (cap := getattr(module, "attn_logit_softcapping", None)) is not None:
        raise TeacherError(f"{what}it caps its scores (attn_logit_softcapping {cap:g})")
    if ("q_norm" in children) != ("k_norm" in children):
        raise TeacherError(f"{what}it has one of q_norm and k_norm, not both")
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    scale = getattr(module, "scaling", None)
    if head_dim is None or scale is None:
        raise TeacherError(f"{what}it does not state head_dim and scaling")
    found = parts or {part: Projection(part, cast("nn.Linear", children[part])) for part in sorted(_PARTS)}
    q, k, v, o = (found[part] for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    if o.in_features != heads * head_dim or v.out_features != k.out_features or heads % kv_heads:
        raise TeacherError(
            f"{what}shapes q {q.out_features}, k {k.out_features}, v {v.out_features}, o {o.in_features} "
            f"do not make heads of {head_dim}"
        )
    norm_over = None
    for norm, size in (("q_norm", heads * head_dim), ("k_norm", kv_heads * head_dim)):
        if norm in children:
            width = tuple(cast("Tensor", children[norm].weight).shape)
            kinds: dict[tuple[int, ...], str] = {(size,): "all", (head_dim,): "head"}
            over = kinds.get(width)
            if over is None or (norm == "k_norm" and over != norm_over and size != head_dim):
                raise TeacherError(f"{what}{norm} is over {width}, neither over one head of {head_dim} nor over all")
            norm_over = norm_over or over
    config = model.config.get_text_config(decoder=True)
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    layer_type = None
    if rotary is not None and not hasattr(rotary, "inv_freq"):
        layer_type = (getattr(config, "layer_types", None) or {index: None})[index]
        if not hasattr(rotary, f"{layer_type}_inv_freq"):
            raise TeacherError(
                f"{what}its rotary embedding ({type(rotary).__name__}) is not one for each type of layer"
            )
    frequencies = None
    if rotary is not None and getattr(module, "use_rope", True):  # SmolLM3 has layers without
        frequencies = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
    return AttentionView(
        layer=index,
        name=name,
        module=module,
        q_proj=q,
        k_proj=k,
        v_proj=v,
        o_proj=o,
        q_norm=children.get("q_norm"),
        k_norm=children.get("k_norm"),
        norm_over=norm_over,
        hidden_size=q.in_features,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(scale),
        rotary_dim=0 if frequencies is None else min(head_dim, 2 * frequencies.shape[-1]),
        window=_window(config, module, index),
        layer_type=layer_type,
    )


def _window(config: PreTrainedConfig, module: nn.Module, index: int) -> int | None:
    """Where layers have types, only a sliding one has a window. Mistral states its window in the config alone."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[index] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


@torch.no_grad()
def _check(model: PreTrainedModel, view: AttentionView, length: int = 8) -> None:
    """Refuses a view whose attention is not what its module computes, on random hidden states."""
    weight = view.o_proj.weight
    generator = torch.Generator().manual_seed(0)
    # Small, so that the softmax does not saturate and hide a difference.
    hidden = 0.3 * torch.randn(1, length, view.hidden_size, generator=generator).to(weight)
    positions = torch.arange(length, device=weight.device)[None]
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    kind = () if view.layer_type is None else (view.layer_type,)
    position_embeddings = rotary(hidden, positions, *kind) if rotary is not None else None
    q, k, v = view.project(hidden, position_embeddings)
    unseen = view.unseen(length, weight.device)[None, None]
    mask = torch.zeros_like(unseen, dtype=weight.dtype).masked_fill(unseen, torch.finfo(weight.dtype).min)
    expected = view.module(hidden_states=hidden, position_embeddings=position_embeddings, attention_mask=mask)[0]
    found = view.o_proj(view.attend(view.weights(q, k), v).flatten(2))
    error = (found - expected).float().norm() / expected.float().norm()
    if not error < (1e-4 if weight.dtype == torch.float32 else 5e-2):
        raise TeacherError(
            f"{view.name} ({type(view.module).__name__}) is not understood: it computes something else than attention "
            f"with its q, k, v, o, norms, scale and rotary (relative difference {error:.1e})"
        )
