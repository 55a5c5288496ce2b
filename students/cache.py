"""What a student remembers while it decodes: a state for each mixer layer, keys and values where attention is kept.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin


class HybridCache(DynamicCache):
    """A `DynamicCache` whose mixer layers hold a `StateLayer`; its size does not grow in those layers."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.config = config
        for index, mixer in enumerate(config.mixers):
            if mixer != "attention":
                self.layers[index] = StateLayer()

    def reset(self) -> None:
        """Empties it, as a new one (transformers before 5.23 only zeroes keys and values, and keeps their length)."""
        self.layers = HybridCache(self.config).layers


class StateLayer(CacheLayerMixin):
    """The convolution tail and the state of one mixer layer.

    Unlike transformers' linear-attention layers it counts the tokens it has seen, so a model with no attention layer
    left still knows its positions and masks.
    """

    def __init__(self):
        super().__init__()
        self.conv_state: Tensor | None = None  # (B, channels, kernel - 1): the last inputs of the convolution
        self.ssm_state: Tensor | None = None  # (B, H, P, N), float32
        self.seen = 0

    def advance(self, conv_state: Tensor, ssm_state: Tensor, tokens: int) -> None:
        """Takes the states after `tokens` more tokens."""
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.seen += tokens
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state[indices])

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a recurrent state cannot be rolled back: crop and assisted decoding are not possible here")

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu"))

    def prefetch(self) -> None:
        """A state goes back to its device in the mixer, which knows it."""

    def lazy_initialization(self, key_states, value_states) -> None:
        raise TypeError("a mixer layer keeps no keys and values")

    update = lazy_initialization

    def _map(self, function) -> None:
        if self.is_initialized:
            self.conv_state, self.ssm_state = function(self.conv_state), function(self.ssm_state)


def document_index(position_ids: Tensor) -> Tensor:
    """Document index (B,L) of packed sequences, from position ids (B,L) that restart at each document."""
    new = torch.ones_like(position_ids, dtype=torch.bool)
    new[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return new.cumsum(dim=-1, dtype=torch.int32) - 1
