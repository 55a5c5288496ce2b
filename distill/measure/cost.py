"""What a sequence costs a model: attention, memory, time."""

import statistics
import time
from typing import cast

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ...students.modeling.modeling_hybrid import cache_name
from ..run.records import Cost
from ..run.seconds import part
from ..trans_points import TransPoints

DECODED = 16  # tokens, one by one after the context


@part("cost")
@torch.no_grad()
def measure_cost(
    model: PreTrainedModel, length: int, tokens: int = DECODED, trans_points: TransPoints | None = None
) -> Cost:
    """Runs a sequence of `length` tokens and decodes `tokens` more; times are the best of two and the median.

    Args:
        model: a teacher or a student.
        trans_points: those of a student, for the share of attention.
    """
    ids = torch.randint(
        model.config.get_text_config(decoder=True).vocab_size, (1, length), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(model.device)
    prefills, decodes = [], []
    for _ in range(2):  # the first pass may compile kernels
        cache = new_cache(model)
        prefills.append(_seconds(model, ids, cache))
        held = cache_bytes(cache)
        decodes = [_seconds(model, ids[:, i % length, None], cache) for i in range(tokens)]
    share = None
    if trans_points is not None:
        share = sum(min(point, length) for point in trans_points) / (len(trans_points) * length)
    times = min(prefills), statistics.median(decodes)
    return Cost(length, share, held, *times, str(model.dtype).removeprefix("torch."), _device_name(model.device))


def cache_bytes(cache: Cache) -> int:
    """Memory that a cache holds on to, whole storages."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def new_cache(model: PreTrainedModel, max_cache_len: int | None = None) -> Cache:
    """An empty cache for a model, of students or not; a static one for so many tokens."""
    # By name: the class of an export that came with its code is not this package's.
    if (own := getattr(model, "new_cache", None)) is not None:
        return cast(Cache, own() if max_cache_len is None else own(max_cache_len))
    return DynamicCache(config=model.config) if max_cache_len is None else StaticCache(model.config, max_cache_len)


def _seconds(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> float:
    memory = {cache_name(type(model.get_decoder())): cache}
    begun = time.perf_counter()
    model(input_ids=ids, **memory, use_cache=True, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - begun


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
