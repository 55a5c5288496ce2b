"""What a mixer layer remembers while it decodes: the memory of one layer in a `HybridCache`.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class StateLayer(CacheLayerMixin):
    """The convolution tail and the state of one mixer layer.

    Unlike transformers' linear-attention layers it counts the tokens it has seen, so a model with no attention layer
    left still knows its positions and masks.

    In a static cache, where attention holds `max_cache_len` tokens, it is fixed as soon as its tensors will keep their
    shapes: they are then written to in place, and nothing of it but tensors changes, so that a step is compiled once.
    """

    tensors: ClassVar[tuple[str, ...]] = ("conv_state", "ssm_state")
    can_be_static: ClassVar[bool] = True

    def __init__(self):
        super().__init__()
        self.max_cache_len: int | None = None  # of a static cache
        self.fixed = False
        self.advanced = False  # since somebody has last looked
        self.conv_state: Tensor | None = None  # (B, channels, kernel - 1): the last inputs of the convolution
        self.ssm_state: Tensor | None = None  # (B, H, P, N) in most mixers, float32
        self.seen: int | Tensor = 0  # columns; a tensor once it is fixed
        # How many each row has seen, padding left out; one entry where all rows are alike. Not counted once fixed.
        self.tokens = [0]

    def advance(self, conv_state: Tensor | None, ssm_state: Tensor | None, columns: int, tokens: list[int]) -> None:
        """Takes the states after `columns` more columns; `tokens`: how many each row has now seen."""
        self.advanced = True
        self.seen += columns
        if self.fixed:
            for held, new in ((self.conv_state, conv_state), (self.ssm_state, ssm_state)):
                if held is not None and new is not held:
                    held.copy_(new)  # type: ignore[arg-type]  # what it has once it has for good
            return
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.tokens = tokens if len(set(tokens)) > 1 else tokens[:1]
        self.is_initialized = True
        if self.max_cache_len is not None and self.keeps_shape:
            assert ssm_state is not None
            self.seen, self.fixed = torch.tensor(self.seen, device=ssm_state.device), True
            mark_static(self)

    @property
    def keeps_shape(self) -> bool:
        """Whether its tensors will: it has nothing else to remember. All rows have begun then."""
        return min(self.tokens) > 0

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]  # an attribute there
        return self.max_cache_len is not None

    def tokens_after(self, columns: int, pads: list[int]) -> list[int]:
        """`tokens` after `columns` more columns; `pads`: how many of these are padding in each row."""
        return [seen + columns - pad for seen, pad in zip(*by_row(self.tokens, pads), strict=True)]

    def get_seq_length(self) -> int:
        return self.seen  # type: ignore[return-value]  # a tensor in static layers of attention, too

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))
        if len(self.tokens) > 1:
            self.tokens = [count for count in self.tokens for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda state: state[indices])
        self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a recurrent state cannot be rolled back: crop and assisted decoding are not possible here")

    def offload(self) -> None:
        self._map(lambda state: state.to("cpu"))

    def prefetch(self) -> None:
        """A state goes back to its device in the mixer, which knows it."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise TypeError("a mixer layer keeps no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        self.lazy_initialization(key_states, value_states)

    def _map(self, function) -> None:
        for name in self.tensors:
            if (tensor := getattr(self, name)) is not None:
                new = function(tensor)
                if self.fixed and new.shape == tensor.shape:
                    tensor.copy_(new)
                else:
                    setattr(self, name, new)
        if self.fixed:
            mark_static(self)

    def _select(self, indices: Tensor) -> None:
        if len(self.tokens) > 1:  # otherwise the device is not waited for
            self.tokens = torch.tensor(self.tokens)[indices.cpu()].tolist()


class KeysLayer(StateLayer):
    """The keys and values that one mixer layer attends to."""

    tensors: ClassVar[tuple[str, ...]] = (*StateLayer.tensors, "keys", "values", "real")
    can_be_static: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.keys: Tensor | None = None  # (B, columns, K, P), as attention reads them
        self.values: Tensor | None = None
        self.real: Tensor | None = None  # (B, columns) which of these are no padding; None: all

    def hold(self, **tensors: Tensor) -> None:
        """Adds columns (B, columns, ...) to what it has under these names."""
        for name, tensor in tensors.items():
            held = getattr(self, name)
            setattr(self, name, tensor if held is None else torch.cat((held.to(tensor.device), tensor), 1))

    def hold_real(self, real: Tensor | None, batch: int, columns: int) -> None:
        """Adds columns of `real` (B, columns), where None is no padding; before `hold` adds their keys."""
        if real is None:
            if self.real is None:
                return
            real = self.real.new_ones(batch, columns)
        elif self.real is None and self.keys is not None:
            self.real = real.new_ones(batch, self.keys.shape[1])
        self.hold(real=real)

    def keep(self, columns: int) -> None:
        """Forgets all but the last columns of keys and values."""
        for name in ("keys", "values", "real"):
            if (held := getattr(self, name)) is not None and held.shape[1] > columns:
                setattr(self, name, held[:, held.shape[1] - columns :].clone())  # a view would hold all of them


def mark_static(layer: Any) -> None:
    """Tells compilers that a layer's tensors stay where they are, without which CUDA graphs cannot write to them."""
    for value in vars(layer).values():
        if isinstance(value, Tensor):
            torch._dynamo.mark_static_address(value)


def by_row(*counts: list[int]) -> list[list[int]]:
    """Counts of tokens with as many entries each as there are rows; one entry stands for all rows."""
    rows = max(map(len, counts))
    return [entries * rows if len(entries) == 1 else entries for entries in counts]
