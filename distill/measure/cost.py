"""What a sequence costs a student at a schedule: attention, memory, time."""

import statistics
import time

import torch
from transformers import Cache, PreTrainedModel

from ...students import HybridForCausalLM
from ..run.records import Cost
from ..trans_points import TransPoints


@torch.no_grad()
def measure_cost(model: HybridForCausalLM, trans_points: TransPoints, length: int, tokens: int = 16) -> Cost:
    """Runs a sequence of `length` tokens and decodes `tokens` more; times are the best of two and the median."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    prefills, decodes = [], []
    for _ in range(2):  # the first pass may compile kernels
        cache = model.new_cache()
        prefills.append(_seconds(model, ids, cache))
        held = cache_bytes(cache)
        decodes = [_seconds(model, ids[:, i % length, None], cache) for i in range(tokens)]
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


def _seconds(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> float:
    begun = time.perf_counter()
    model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - begun


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
