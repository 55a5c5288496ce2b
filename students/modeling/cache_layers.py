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

    tensors: ClassVar[tuple[str, ...]] = ("conv_state", "ssm_state", "log_decay")
    can_be_static: ClassVar[bool] = True

    def __init__(self):
        super().__init__()
        self.max_cache_len: int | None = None  # of a static cache
        self.fixed = False
        self.advanced = False  # since somebody has last looked
        self.conv_state: Tensor | None = None  # (B, channels, kernel - 1): the last inputs of the convolution
        self.ssm_state: Tensor | None = None  # (B, H, P, N) in most mixers, float32
        # Of a cache that can be merged: the logarithm of what all tokens together leave of a state of before them,
        # float32, as it is multiplied with the state. None from mixers that leave no such factor.
        self.mergeable = False
        self.log_decay: Tensor | None = None
        self.seen: int | Tensor = 0  # columns; a tensor once it is fixed
        # How many each row has seen, padding left out; one entry where all rows are alike. Not counted once fixed.
        self.tokens = [0]

    def advance(self, conv_state: Tensor | None, ssm_state: Tensor | None, columns: int, tokens: list[int]) -> None:
        """Takes the states after `columns` more columns; `tokens`: how many each row has now seen."""
        self.advanced = True
        self.seen += columns
        if self.fixed:
            for name, new in (("conv_state", conv_state), ("ssm_state", ssm_state)):
                if new is not None:
                    self._put(name, new)
            return
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.tokens = tokens if len(set(tokens)) > 1 else tokens[:1]
        self.is_initialized = True
        if self.max_cache_len is not None and self.keeps_shape:
            assert ssm_state is not None
            self.seen, self.fixed = torch.tensor(self.seen, device=ssm_state.device), True
            mark_static(self)

    def decay_by(self, log_decay: Tensor | None) -> None:
        """Counts what more tokens leave of a state, if that is a factor; only where it is `mergeable`."""
        if log_decay is not None:
            self.log_decay = log_decay if self.log_decay is None else self.log_decay + log_decay

    @property
    def log_left(self) -> Tensor | None:
        """The logarithm of how much of each number of a state (B, heads or channels, ...) all tokens leave."""
        return self.log_decay

    def carried(self, log_decay: Tensor) -> Tensor | int:
        """What is left of its state after further tokens with this `log_decay`."""
        return 0 if self.ssm_state is None else self.ssm_state * log_decay.exp()

    def why_not_merged(self, other: "StateLayer") -> str | None:
        """Why what `other` has read cannot come behind what this one has; None if it can."""
        if not other.mergeable or not self.mergeable:
            return "the decays were not kept: read both with new_cache(mergeable=True)"
        if other.tokens != [other.seen]:
            return "the second one has padding, which cannot come after tokens: read it without"
        if other.ssm_state is not None and other.log_decay is None:
            return (
                "what its tokens leave of a state before them is no factor for each number of it, and is not kept: "
                "read the second text after the first"
            )
        return None

    def merge(self, other: "StateLayer") -> None:
        """Makes this the memory of its own tokens and then those of `other`, which has begun anew."""
        if other.ssm_state is not None:
            assert other.log_decay is not None  # as `why_not_merged` has found
            self.ssm_state = self.carried(other.log_decay) + other.ssm_state
            self.decay_by(other.log_decay)
        if other.conv_state is not None:
            width = other.conv_state.shape[-1]
            new = other.conv_state[..., max(width - other.tokens[0], 0) :]
            old = new[..., :0] if self.conv_state is None else self.conv_state
            joined = torch.cat((old, new), -1)
            self.conv_state = joined[..., joined.shape[-1] - width :].clone()
        self.seen += other.seen
        self.tokens = [a + b for a, b in zip(*by_row(self.tokens, other.tokens), strict=True)]
        self.is_initialized = self.is_initialized or other.is_initialized

    def interpolate(self, other: "StateLayer", weight: float) -> None:
        """Moves each of its numbers to that of `other`, which holds as many."""
        for name in self.tensors:
            if (own := getattr(self, name)) is not None and own.is_floating_point():
                setattr(self, name, own.lerp(getattr(other, name).to(own), weight))
        self.seen = round((1 - weight) * int(self.seen) + weight * int(other.seen))
        counts = by_row(self.tokens, other.tokens)
        self.tokens = [round((1 - weight) * a + weight * b) for a, b in zip(*counts, strict=True)]

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

    def _put(self, name: str, new: Tensor) -> None:
        """Takes a tensor in place of the one of this name: where that is fixed and as large, into it."""
        held = getattr(self, name)
        if not self.fixed or held.shape != new.shape:
            setattr(self, name, new)
        elif new is not held:
            held.copy_(new)

    def _map(self, function) -> None:
        for name in self.tensors:
            if (tensor := getattr(self, name)) is not None:
                self._put(name, function(tensor))
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

    def merge(self, other: StateLayer) -> None:
        assert isinstance(other, KeysLayer)
        if other.keys is not None and other.values is not None:
            self.hold_real(other.real, *other.keys.shape[:2])
            self.hold(keys=other.keys, values=other.values)
        super().merge(other)

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
