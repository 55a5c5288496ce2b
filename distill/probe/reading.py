"""What a model holds after each token: hidden states of all layers, and the states of its mixers."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...students import HybridForCausalLM
from ...students.modeling.cache_layers import StateLayer
from ...students.modeling.modeling_hybrid import cache_name
from ..objectives import hidden_states


@torch.no_grad()
def hidden_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each layer gives for tokens (B,L): (B,L,D); the last one after the last norm."""
    return hidden_states(model, {"input_ids": ids, "use_cache": False}, every=True)


@torch.no_grad()
def states_of(model: PreTrainedModel, ids: Tensor) -> Iterator[dict[int, Tensor]]:
    """After each of the tokens (B,L) the state of each layer that has one: (B, heads or channels, ...).

    They are read token by token, as in decoding. Tensors are changed by the next token: what is kept has to be copied.
    Layers of attention have none, and TransMamba layers before their TransPoint.
    """
    if not isinstance(model, HybridForCausalLM):
        yield from ({} for _ in range(ids.shape[1]))
        return
    cache, decoder = model.new_cache(), model.get_decoder()
    name = cache_name(type(decoder))
    for token in ids.split(1, 1):
        decoder(input_ids=token, use_cache=True, **{name: cache})
        layers = enumerate(cache.layers)
        yield {i: o.ssm_state for i, o in layers if isinstance(o, StateLayer) and o.ssm_state is not None}
