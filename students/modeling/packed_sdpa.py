"""PyTorch's attention, for a token at a time without copies of keys and values: transformers repeats those that several
heads share wherever a mask is given and the step is compiled, and so reads and writes them as often as heads do.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "sdpa_packed"  # as `attn_implementation` takes it


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers' own: query (B,H,L,P), key and value (B,K,S,P) -> (B,L,H,P). Heads of one key go as tokens of one
    head where there is one token and one mask for all heads."""
    batch, heads, length, _ = query.shape
    shared, masked = heads // key.shape[1], attention_mask is not None and attention_mask.shape[1] == 1
    others = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if length > 1 or shared == 1 or not masked or others:
        more = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    packed = query.reshape(batch, -1, shared, query.shape[-1])
    y = F.scaled_dot_product_attention(packed, key, value, attention_mask, dropout, scale=scaling)
    return y.reshape(batch, 1, heads, -1), None


AttentionInterface.register(PACKED, packed_sdpa)
AttentionMaskInterface.register(PACKED, sdpa_mask)
