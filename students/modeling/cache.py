"""What a student remembers while it decodes: a state for each mixer layer, keys and values where attention is kept.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

import json
import os
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache_layers import StateLayer, mark_static
from .configuration_mixers import MIXERS


class StateDifference(NamedTuple):
    """How far the memories of one layer are from each other, for each row and head (B, H).

    Of a mixer those of its state; of attention those of its keys and values, by key/value head.
    """

    norm: Tensor
    other_norm: Tensor
    distance: Tensor

    @property
    def relative(self) -> Tensor:
        """The distance over the mean of both norms: 0 where they are equal, at most 2."""
        return 2 * self.distance / (self.norm + self.other_norm).clamp(min=torch.finfo(self.norm.dtype).tiny)


class HybridCache(DynamicCache):
    """A `DynamicCache` whose mixer layers hold the memory that these need, a `StateLayer`, which does not grow.

    A cache is what a model remembers of the tokens so far, and it can be continued more than once: `fork` copies it,
    `save` and `load` put it on disk and take it back. Each is exact: what follows has the same logits, bit for bit.
    What several texts have left is compared by `difference`, and made into one memory by `interpolate` and `merge`.

    Args:
        config: of the model.
        max_cache_len: makes it static: keys and values of kept attention lie in tensors for so many tokens, and states
            are written to in place, so that a step of decoding can be compiled. None: it grows.
        mergeable: whether mixers also keep what their tokens leave of a state, which `merge` needs; only of one that
            grows.

    Raises:
        ValueError: max_cache_len is less than 1, or comes with mergeable; or one of the mixers has no memory of that
            kind.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None, mergeable: bool = False):
        super().__init__(config=config)
        self.config, self.static_length = config, max_cache_len
        if max_cache_len is not None:
            if mergeable:
                raise ValueError("a static cache cannot be merged: leave max_cache_len or mergeable out")
            if max_cache_len < 1:
                raise ValueError(f"max_cache_len: expected at least 1, got {max_cache_len}")
            if lacking := [mixer for mixer in config.mixers if not can_be_static(mixer)]:
                raise ValueError(f"a layer of {lacking[0]} has no static memory: leave max_cache_len out")
            self.layers = StaticCache(config, max_cache_len).layers
        for index, mixer in enumerate(config.mixers):
            if mixer != "attention":
                self.layers[index] = layer = MIXERS[mixer].load().remembers()
                layer.max_cache_len, layer.mergeable = max_cache_len, mergeable

    @property
    def fixed(self) -> bool:
        """Whether nothing but tensors of it changes from now on: it is static, and padding has come to an end."""
        return all(layer.fixed for layer in self.layers if isinstance(layer, StateLayer))

    def reset(self) -> None:
        """Empties it, as a new one (transformers before 5.23 only zeroes keys and values, and keeps their length)."""
        mergeable = any(layer.mergeable for layer in self.layers if isinstance(layer, StateLayer))
        self.layers = HybridCache(self.config, self.static_length, mergeable).layers

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in cast("list[Any]", self.layers):
            if isinstance(layer, StaticLayer):
                _change_rows(layer, lambda tensor: tensor.repeat_interleave(repeats, 0))
            else:
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in cast("list[Any]", self.layers):
            if isinstance(layer, StaticLayer):
                _change_rows(layer, lambda tensor: tensor[indices])
            else:
                layer.batch_select_indices(indices)

    def fork(self, copies: int = 1) -> "HybridCache":
        """A cache of its own with the same memory; this one stays as it is.

        Args:
            copies: how often each row is repeated: a batch of B rows becomes one of B * copies, row b the rows
                b * copies to (b+1) * copies - 1.

        Raises:
            ValueError: copies is less than 1.
        """
        if copies < 1:
            raise ValueError(f"copies: expected at least 1, got {copies}")
        fork = HybridCache(self.config, self.static_length)
        for layer, own in zip(fork.layers, self.layers, strict=True):
            vars(layer).update({name: _copied(value) for name, value in vars(own).items()})
            if self.static_length is not None:
                mark_static(layer)
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        return fork

    def difference(self, other: "HybridCache") -> list[StateDifference | None]:
        """For each layer how far its memory is from that of `other`; None where one of them is empty, and in attention
        that holds another number of tokens.

        Raises:
            ValueError: the other one is of another model, or has another number of rows.
        """
        self._check_other(other)
        found: list[StateDifference | None] = []
        for index in range(len(self.layers)):
            own, others = self._by_head(index), other._by_head(index)
            if own is None or others is None or own.shape[1:] != others.shape[1:]:
                found.append(None)
                continue
            others = others.to(own)
            if len(own) != len(others):
                raise ValueError(f"one cache has {len(own)} rows and the other {len(others)}: select rows first")
            found.append(StateDifference(*(t.norm(dim=-1) for t in (own, others, own - others))))
        return found

    def interpolate(self, other: "HybridCache", weight: float) -> "HybridCache":
        """A cache of its own whose tensors are (1 - weight) of this one's and weight of the other's: bit for bit this
        one at 0 and the other at 1.

        Of a linear recurrence such a state is one that some sequence of inputs leaves, but hardly one of text. Keys and
        values of attention are taken column by column, so both have to hold as many. Counts of tokens are rounded.

        Raises:
            ValueError: the other one is of another model, or holds tensors of other shapes; or one of them is static.
        """
        self._check_other(other, grows=True)
        fork = self.fork()
        for index, (layer, second) in enumerate(fork._layers_beside(other)):
            if not _alike(layer, second):
                raise ValueError(
                    f"layer {index} does not hold as much in both caches: read as many tokens, without padding, with "
                    "caches of the same kind"
                )
            if isinstance(layer, StateLayer):
                layer.interpolate(second, weight)
            elif layer.is_initialized:
                layer.keys, layer.values = (
                    getattr(layer, name).lerp(getattr(second, name), weight) for name in ("keys", "values")
                )
        return fork

    def merge(self, other: "HybridCache") -> "HybridCache":
        """A cache of its own of what this one has read and then what `other` has, which began anew: neither is read
        again. Both are of `new_cache(mergeable=True)`.

        A state after texts A and B is decay(B) state(A) + state(B), as the recurrence is linear (Dao and Gu 2024, arXiv
        2405.21060, section 6); tails of convolutions are those of B, keys and values of attention are joined. For one
        layer with the same inputs that is what reading both leaves, but for

        - the first tokens of B, as many as the convolution has taps less one, which it would have mixed with the last
          of A;
        - positions: B has to be read with `position_ids` that go on from A, or keys are rotated as if it came first;
        - inputs: in all layers but the first those of B would have been others after A. This is the larger part.

        Raises:
            ValueError: the other one is of another model, or one of them is static, or made without `mergeable`. Or a
                layer has no such closed form: gated DeltaNet, whose tokens turn a state rather than scale it, windows
                with sinks, TransMamba up to its TransPoint, rows of B with padding.
        """
        self._check_other(other, grows=True)
        fork = self.fork()
        layers = fork._layers_beside(other)
        for index, (layer, second) in enumerate(layers):
            if isinstance(layer, StateLayer) and (reason := layer.why_not_merged(second)) is not None:
                raise ValueError(f"layer {index} ({self.config.mixers[index]}) cannot be merged: {reason}")
            if {len(t) for t in _held(layer).values()} - {len(t) for t in _held(second).values()}:
                raise ValueError("one cache has more rows than the other: select rows first")
        for layer, second in layers:
            if isinstance(layer, StateLayer):
                layer.merge(second)
            elif second.is_initialized:
                layer.update(second.keys, second.values)
                if layer.is_sliding:  # it counts more than it holds
                    layer.cumulative_length += second.cumulative_length - second.keys.shape[-2]
        return fork

    def _check_other(self, other: "HybridCache", grows: bool = False) -> None:
        if _kind(self.config) != _kind(other.config):
            raise ValueError("the other cache is of a model with other layers")
        if grows and (self.static_length is not None or other.static_length is not None):
            raise ValueError("a static cache stays as it is: read with new_cache() without max_cache_len")

    def _layers_beside(self, other: "HybridCache") -> list[tuple[Any, Any]]:
        return list(zip(self.layers, other.layers, strict=True))

    def _by_head(self, index: int) -> Tensor | None:
        """What a layer holds (B, heads, numbers); None if nothing."""
        layer: Any = self.layers[index]
        if not layer.is_initialized:
            return None
        if isinstance(layer, StateLayer) and layer.ssm_state is not None:
            heads = (self.config.layer_geometry(index) or {}).get("num_heads", self.config.num_attention_heads)
            return layer.ssm_state.reshape(len(layer.ssm_state), heads, -1)
        keys, values = layer.keys, layer.values
        if isinstance(layer, StateLayer):
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return torch.cat((keys, values), -1).flatten(2).float()

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to one safetensors file: tensors as `LAYER.NAME`, counts of tokens as JSON in the metadata."""
        tensors: dict[str, Tensor] = {}
        counts: list[dict] = []
        for index, layer in enumerate(self.layers):
            facts = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
            held = {name: value for name, value in facts.items() if isinstance(value, Tensor)}
            tensors |= {f"{index}.{name}": value.detach().clone().contiguous() for name, value in held.items()}
            counts.append({name: v for name, v in facts.items() if isinstance(v, int | float | list)})
        metadata = {"format": "pt", "for": json.dumps(_kind(self.config)), "layers": json.dumps(counts)}
        metadata["max_cache_len"] = json.dumps(self.static_length)
        save_file(tensors, path, metadata)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PreTrainedConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "HybridCache":
        """The cache that `save` wrote.

        Args:
            config: of the model that goes on with it (`model.config`).
            device: where its tensors go.
            dtype: what the model computes in, and so what keys, values and convolution tails must be in; by default
                that of the config. A model that was moved (`model.bfloat16()`) has another: `model.dtype`.

        Raises:
            ValueError: the file holds no such cache or is damaged; or that is of a model with other layers, heads,
                positions or TransPoints, or with another dtype.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"'{path}' is no safetensors file, or a damaged one ({error}): save it again") from error
        if "for" not in metadata or "layers" not in metadata:
            raise ValueError(f"'{path}' holds no cache that HybridCache.save has written")
        kind = json.loads(metadata["for"])
        for name, value in json.loads(json.dumps(_kind(config))).items():
            if kind.get(name) != value:
                raise ValueError(f"'{path}' is of a model whose {name} is {kind.get(name)}, this one's is {value}")
        # States and decays are in float32 whatever the model is in.
        kept: set[torch.dtype | str] = {
            t.dtype
            for name, t in tensors.items()
            if t.is_floating_point() and not name.endswith((".ssm_state", ".log_decay"))
        }
        expected = dtype or config.dtype
        if expected is not None and kept - {expected}:
            found = ", ".join(sorted(map(str, kept)))
            raise ValueError(
                f"'{path}' holds {found}, the model is in {expected}: load the model in the cache's dtype, or pass "
                "dtype=model.dtype if it was moved to another than its config's"
            )
        cache = cls(config, json.loads(metadata.get("max_cache_len", "null")))
        for index, (layer, counts) in enumerate(zip(cache.layers, json.loads(metadata["layers"]), strict=True)):
            prefix = f"{index}."
            held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if isinstance(layer, DynamicLayer | StaticLayer) and "keys" in held:
                layer.lazy_initialization(held["keys"], held["values"])
            vars(layer).update(counts | held)
            if cache.static_length is not None:
                mark_static(layer)
        return cache


def can_be_static(mixer: str) -> bool:
    """Whether a layer of this name can be in a static cache."""
    return mixer == "attention" or MIXERS[mixer].load().remembers.can_be_static


def _held(layer) -> dict[str, Tensor]:
    """A layer's tensors by name."""
    return {k: v for k, v in vars(layer).items() if isinstance(v, Tensor) and v.ndim and not k.startswith("_")}


def _alike(layer, other) -> bool:
    """Whether two layers hold tensors of the same names and shapes, and the same of what is no number."""
    own, others = _held(layer), _held(other)
    same = {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in others.items()}
    return same and all(t.is_floating_point() or t.equal(others[name]) for name, t in own.items())


def _kind(config: PreTrainedConfig) -> dict:
    """What a model must have in common with a cache."""
    names: tuple[str, ...] = ("base_model_type", "mixers", "trans_points", "mixer_options", "hidden_size")
    names += ("other_options",)
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "layer_types")
    names += ("rope_parameters",)
    return {name: getattr(config, name, None) for name in names}


def _change_rows(layer: StaticLayer, change) -> None:
    if layer.is_initialized:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
        layer.batch_size = len(layer.keys)
        mark_static(layer)


def _copied(value):
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
