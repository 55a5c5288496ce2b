"""What a student remembers while it decodes: a state for each mixer layer, keys and values where attention is kept.

This file travels with exported checkpoints: it imports torch and transformers only.
"""

import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class HybridCache(DynamicCache):
    """A `DynamicCache` whose mixer layers hold a `StateLayer`; its size does not grow in those layers.

    A cache is what a model remembers of the tokens so far, and it can be continued more than once: `fork` copies it,
    `save` and `load` put it on disk and take it back. Each is exact: what follows has the same logits, bit for bit.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.config = config
        for index, mixer in enumerate(config.mixers):
            if mixer != "attention":
                self.layers[index] = TransPointLayer() if mixer == "transmamba" else StateLayer()

    def reset(self) -> None:
        """Empties it, as a new one (transformers before 5.23 only zeroes keys and values, and keeps their length)."""
        self.layers = HybridCache(self.config).layers

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
        fork = HybridCache(self.config)
        for layer, own in zip(fork.layers, self.layers, strict=True):
            vars(layer).update({name: _copied(value) for name, value in vars(own).items()})
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        return fork

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to one safetensors file: tensors as `LAYER.NAME`, counts of tokens as JSON in the metadata."""
        tensors, counts = {}, []
        for index, layer in enumerate(self.layers):
            facts = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
            held = {name: value for name, value in facts.items() if isinstance(value, Tensor)}
            tensors |= {f"{index}.{name}": value.detach().clone().contiguous() for name, value in held.items()}
            counts.append({name: v for name, v in facts.items() if isinstance(v, int | float | list)})
        metadata = {"format": "pt", "for": json.dumps(_kind(self.config)), "layers": json.dumps(counts)}
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
        kept = {t.dtype for name, t in tensors.items() if t.is_floating_point() and not name.endswith(".ssm_state")}
        dtype = dtype or config.dtype
        if dtype is not None and kept - {dtype}:
            found = ", ".join(sorted(map(str, kept)))
            raise ValueError(
                f"'{path}' holds {found}, the model is in {dtype}: load the model in the cache's dtype, or pass "
                "dtype=model.dtype if it was moved to another than its config's"
            )
        cache = cls(config)
        for index, (layer, counts) in enumerate(zip(cache.layers, json.loads(metadata["layers"]), strict=True)):
            prefix = f"{index}."
            held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            if isinstance(layer, DynamicLayer) and held:
                layer.lazy_initialization(held["keys"], held["values"])
            vars(layer).update(counts | held)
        return cache


def _kind(config: PreTrainedConfig) -> dict:
    """What a model must have in common with a cache."""
    names = ("base_model_type", "mixers", "trans_points", "mixer_options", "hidden_size", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_parameters")
    return {name: getattr(config, name, None) for name in names}


def _copied(value):
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


class StateLayer(CacheLayerMixin):
    """The convolution tail and the state of one mixer layer.

    Unlike transformers' linear-attention layers it counts the tokens it has seen, so a model with no attention layer
    left still knows its positions and masks.
    """

    tensors = ("conv_state", "ssm_state")

    def __init__(self):
        super().__init__()
        self.conv_state: Tensor | None = None  # (B, channels, kernel - 1): the last inputs of the convolution
        self.ssm_state: Tensor | None = None  # (B, H, P, N), float32
        self.seen = 0
        self.tokens = [0]  # how many each row has seen, padding left out; one entry where all rows are alike

    def advance(self, conv_state: Tensor | None, ssm_state: Tensor | None, columns: int, tokens: list[int]) -> None:
        """Takes the states after `columns` more columns; `tokens`: how many each row has now seen."""
        self.conv_state, self.ssm_state = conv_state, ssm_state
        self.seen += columns
        self.tokens = tokens if len(set(tokens)) > 1 else tokens[:1]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

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

    def lazy_initialization(self, key_states, value_states) -> None:
        raise TypeError("a mixer layer keeps no keys and values")

    update = lazy_initialization

    def _map(self, function) -> None:
        for name in self.tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))

    def _select(self, indices: Tensor) -> None:
        if len(self.tokens) > 1:  # otherwise the device is not waited for
            self.tokens = torch.tensor(self.tokens)[indices.cpu()].tolist()


class TransPointLayer(StateLayer):
    """What one TransMamba layer remembers: keys and values up to its TransPoint, after it a state.

    Until the first row of a batch passes the TransPoint, it also holds what the memory converter will need; until the
    last row has reached it, it holds keys and values and a state. Then the state is all there is.
    """

    tensors = (*StateLayer.tensors, "keys", "values", "real", "dt", "x", "B")

    def __init__(self):
        super().__init__()  # keys and values: (B, columns, K, P), as attention reads them
        self.real: Tensor | None = None  # (B, columns) which of these are no padding; None: all
        self.dt: Tensor | None = None  # (B, columns, H) steps
        self.x: Tensor | None = None  # (B, columns, K, P) inputs and input maps of the state, where they are not
        self.B: Tensor | None = None  # values and keys
        self.trans_point: int | float | None = None

    def settle(self, trans_point: int | float) -> None:
        """Fixes the TransPoint with the first tokens. Raises ValueError where it is another one later."""
        if self.trans_point not in (None, trans_point):
            raise ValueError(
                f"this cache was filled with TransPoint {self.trans_point} and the layer now has {trans_point}: "
                "start a new cache after set_trans_points"
            )
        self.trans_point = trans_point

    def hold(self, **tensors: Tensor) -> None:
        """Adds columns (B, columns, ...) to what it has under these names."""
        for name, tensor in tensors.items():
            held = getattr(self, name)
            setattr(self, name, tensor if held is None else torch.cat((held.to(tensor.device), tensor), 1))

    def hold_real(self, real: Tensor | None, batch: int, columns: int) -> None:
        """Adds columns of `real` (B, columns), where None is no padding; before `hold` adds their keys."""
        if real is None and self.real is None:
            return
        if self.real is None and self.keys is not None:
            self.real = real.new_ones(batch, self.keys.shape[1])
        self.hold(real=self.real.new_ones(batch, columns) if real is None else real)

    def keep(self, columns: int) -> None:
        """Forgets all but the last columns of keys and values."""
        for name in ("keys", "values", "real"):
            if (held := getattr(self, name)) is not None and held.shape[1] > columns:
                setattr(self, name, held[:, held.shape[1] - columns :].clone())  # a view would hold all of them

    def drop(self, *names: str) -> None:
        for name in names:
            setattr(self, name, None)


def by_row(*counts: list[int]) -> list[list[int]]:
    """Counts of tokens with as many entries each as there are rows; one entry stands for all rows."""
    rows = max(map(len, counts))
    return [entries * rows if len(entries) == 1 else entries for entries in counts]
