"""One view of a teacher's attention, whatever its family: projections, norms, heads, scale, rotary, window.

A view is read off the modules themselves, not off the family's name, and then *checked*: the attention it describes is
computed in plain PyTorch on random input and must equal what the module computes. So a family that does something this
file does not know (soft-capping, sinks, another rotary layout) is refused rather than converted wrongly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import TeacherError

_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}


@dataclass(frozen=True)
class AttentionView:
    """The attention of one layer. H query heads, K key/value heads (query head h reads head h // (H/K)), head_dim P."""

    layer: int
    name: str  # of the module in the model: "model.layers.3.self_attn"
    module: nn.Module
    q_proj: nn.Linear  # (H*P, hidden)
    k_proj: nn.Linear  # (K*P, hidden)
    v_proj: nn.Linear  # (K*P, hidden)
    o_proj: nn.Linear  # (hidden, H*P)
    q_norm: nn.Module | None  # over one head, after the projection and before rotary
    k_norm: nn.Module | None
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of q.k before softmax
    rotary_dim: int  # how many leading dimensions of a head are rotated (0: none)
    window: int | None  # a query sees this many last tokens, itself included (None: all)

    @property
    def biases(self) -> tuple[str, ...]:
        """Which of the four projections have a bias."""
        return tuple(name for name in sorted(_PARTS) if getattr(self, name).bias is not None)

    def project(self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B,L,H,P), keys and values (B,L,K,P), normed and rotated, of hidden states (B,L,hidden)."""
        split = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden).view(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = self.q_norm(q) if self.q_norm is not None else q
        k = self.k_norm(k) if self.k_norm is not None else k
        if self.rotary_dim:
            q, k = (rotate(t, position_embeddings) for t in (q, k))
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


def attention_view(model: PreTrainedModel) -> list[AttentionView]:
    """A view of every layer's attention, each checked against its module.

    Raises:
        TeacherError: a layer's attention has a part, or computes something, that is not understood; names it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    views = []
    for index, layer in enumerate(decoder_layers(model)):
        if getattr(layer, "self_attn", None) is None:
            raise TeacherError(f"layer {index} ({type(layer).__name__}) is not understood: it has no `self_attn`")
        try:
            view = _view(model, index, layer.self_attn, names[id(layer.self_attn)])
            if view.q_proj.weight.device.type != "meta":
                _check(model, view)  # of each layer: some families leave out the rotary embedding in every fourth
        except TeacherError:
            raise
        except Exception as error:  # what a family asks for or lacks may be anything
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise TeacherError(
                f"layer {index} ({type(layer.self_attn).__name__}) is not understood: seen as other families' "
                f"attention, it fails with {what}"
            ) from error
        views.append(view)
    return views


def _view(model: PreTrainedModel, index: int, module: nn.Module, name: str) -> AttentionView:
    what = f"{name} ({type(module).__name__}) is not understood: "
    children = dict(module.named_children())
    if missing := sorted(_PARTS - children.keys()):
        raise TeacherError(f"{what}it lacks {', '.join(missing)} and has {', '.join(sorted(children)) or 'no parts'}")
    strangers = sorted(children.keys() - _PARTS - _NORMS) + sorted(n for n, _ in module.named_parameters(recurse=False))
    if strangers:
        raise TeacherError(f"{what}no place for its {', '.join(strangers)}")
    # On the small inputs of the numeric check a cap makes no difference.
    if (cap := getattr(module, "attn_logit_softcapping", None)) is not None:
        raise TeacherError(f"{what}it caps its scores (attn_logit_softcapping {cap:g})")
    if ("q_norm" in children) != ("k_norm" in children):
        raise TeacherError(f"{what}it has one of q_norm and k_norm, not both")
    head_dim, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    if head_dim is None or scale is None:
        raise TeacherError(f"{what}it does not state head_dim and scaling")
    q, k, v, o = (children[part] for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    if o.in_features != heads * head_dim or v.out_features != k.out_features or heads % kv_heads:
        raise TeacherError(
            f"{what}shapes q {q.out_features}, k {k.out_features}, v {v.out_features}, o {o.in_features} "
            f"do not make heads of {head_dim}"
        )
    for norm in sorted(_NORMS & children.keys(), reverse=True):
        width = children[norm].weight.shape
        if tuple(width) != (head_dim,):
            raise TeacherError(f"{what}{norm} is over {tuple(width)}, not over one head of {head_dim}")
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is not None and not hasattr(rotary, "inv_freq"):
        raise TeacherError(f"{what}its rotary embedding ({type(rotary).__name__}) is not one for all layers")
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
        hidden_size=q.in_features,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(scale),
        rotary_dim=0 if rotary is None else min(head_dim, 2 * rotary.inv_freq.shape[-1]),
        window=_window(model.config.get_text_config(decoder=True), module, index),
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
    weight = view.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    # Small, so that the softmax does not saturate and hide a difference.
    hidden = 0.3 * torch.randn(1, length, view.hidden_size, generator=generator).to(weight)
    positions = torch.arange(length, device=weight.device)[None]
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    position_embeddings = rotary(hidden, positions) if rotary is not None else None
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
