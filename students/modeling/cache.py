"""What a student remembers while it decodes: a state for each mixer layer, keys and values where attention is kept.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

import json
import os
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .cache_layers import StateLayer, mark_static
from .configuration_mixers import MIXERS


class HybridCache(DynamicCache):
    """A `DynamicCache` whose mixer layers hold the memory that these need, a `StateLayer`, which does not grow.

    A cache is what a model remembers of the tokens so far, and it can be continued more than once: `fork` copies it,
    `save` and `load` put it on disk and take it back. Each is exact: what follows has the same logits, bit for bit.

    Args:
        config: of the model.
        max_cache_len: makes it static: keys and values of kept attention lie in tensors for so many tokens, and states
            are written to in place, so that a step of decoding can be compiled. None: it grows.

    Raises:
        ValueError: max_cache_len is less than 1, or one of the mixers has no memory of that kind.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int | None = None):
        super().__init__(config=config)
        self.config, self.static_length = config, max_cache_len
        if max_cache_len is not None:
            if max_cache_len < 1:
                raise ValueError(f"max_cache_len: expected at least 1, got {max_cache_len}")
            if lacking := [mixer for mixer in config.mixers if not can_be_static(mixer)]:
                raise ValueError(f"a layer of {lacking[0]} has no static memory: leave max_cache_len out")
            self.layers = StaticCache(config, max_cache_len).layers
        for index, mixer in enumerate(config.mixers):
            if mixer != "attention":
                self.layers[index] = layer = MIXERS[mixer].load().remembers()
                layer.max_cache_len = max_cache_len

    @property
    def fixed(self) -> bool:
        """Whether nothing but tensors of it changes from now on: it is static, and padding has come to an end."""
        return all(layer.fixed for layer in self.layers if isinstance(layer, StateLayer))

    def reset(self) -> None:
        """Empties it, as a new one (transformers before 5.23 only zeroes keys and values, and keeps their length)."""
        self.layers = HybridCache(self.config, self.static_length).layers

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
        # States are in float32 whatever the model is in.
        kept: set[torch.dtype | str] = {
            t.dtype for name, t in tensors.items() if t.is_floating_point() and not name.endswith(".ssm_state")
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
