"""What stands in for a layer's attention while it is judged: the same attention, of the last few tokens alone, or the
mixer that would take its place."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...students import HybridForCausalLM
from ...teachers import AttentionView, attention_view

# Takes hidden states (B,L,hidden) and position embeddings as attention gets them; gives the output (B,L,hidden).
StandIn = Callable[[Tensor, tuple[Tensor, Tensor] | None], Tensor]


def windows(teacher: PreTrainedModel, window: int, sinks: int = 0) -> dict[int, StandIn]:
    """For each layer its own attention, of the last `window` tokens and the first `sinks` of a text alone.

    A layer that has a narrower window of its own keeps it.
    """
    return {view.layer: _narrowed(view, min(window, view.window or window), sinks) for view in attention_view(teacher)}


def mixers(student: HybridForCausalLM) -> dict[int, StandIn]:
    """For each layer the student's mixer."""

    def of(mixer) -> StandIn:
        # In float32, as they are trained, whatever the teacher is in.
        return lambda hidden, rotary: mixer(hidden.float(), rotary)[0].to(hidden.dtype)

    return {layer: of(mixer) for layer, mixer in enumerate(student.mixer_layers()) if mixer is not None}


def _narrowed(view: AttentionView, window: int, sinks: int) -> StandIn:
    def attend(hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = view.project(hidden, rotary)
        return view.o_proj(_local(q, k, v.to(q.dtype), view.scale, window, sinks).flatten(2))

    return attend


def _local(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sinks: int) -> Tensor:
    """Attention (B,L,H,P) of queries (B,L,H,P) to keys and values (B,L,K,P): the last `window`, and the first `sinks`.

    Block by block of `window` queries, which see their own block and the one before: L * 2 window products, not L^2.
    """
    batch, length, heads, size = q.shape
    window, sinks = min(window, length), min(sinks, length)
    blocks = -(-length // window)
    k, v = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (k, v))
    fill = (0, 0, 0, 0, 0, blocks * window - length)
    q_blocks = F.pad(q, fill).view(batch, blocks, window, heads, size)

    def read(part: Tensor) -> Tensor:
        """(B * blocks, H, sinks + 2 window, P): what each block sees of keys or values."""
        own = F.pad(part, fill).view(batch, blocks, window, heads, size)
        before = F.pad(own[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        first = part[:, None, :sinks].expand(-1, blocks, -1, -1, -1)
        return torch.cat((first, before, own), dim=2).flatten(0, 1).transpose(1, 2)

    t = torch.arange(blocks * window, device=q.device).view(blocks, window, 1)
    block = torch.arange(blocks, device=q.device).view(blocks, 1, 1) * window
    s = block + torch.arange(-window, window, device=q.device)
    near = (s >= 0) & (t >= s) & (t - s < window)
    far = t - torch.arange(sinks, device=q.device) >= window  # nearer ones are seen already
    seen = torch.cat((far, near), dim=2)[None, :, None].expand(batch, -1, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(q_blocks.flatten(0, 1).transpose(1, 2), read(k), read(v), seen, scale=scale)
    return out.transpose(1, 2).reshape(batch, blocks * window, heads, size)[:, :length]
