"""At which TransPoints a TransMamba student trains in each step, and what a schedule costs.

Everything here that training reads is a pure function of the recipe and the step, so that a resumed run is the same.
Schedules are lists with one TransPoint for each layer: tokens, or `math.inf` (attention throughout).
"""

import hashlib
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from ..students import HybridForCausalLM, StudentError, parse_trans_points
from ..students.configuration_mixers import have_trans_points
from .config import Recipe
from .settings import DistillConfig

TransPoints = list[int | float]


def trans_points_in_step(
    step: int, schedules: list[TransPoints], length: int, settings: DistillConfig, seed: int
) -> TransPoints:
    """The schedule of step `step` (from 0): one of `schedules`, drawn from seed and step, and annealed towards.

    Args:
        length: tokens in a training sequence, where annealing starts from.
        settings: `steps` and `anneal` are read.
    """
    mixed = hashlib.sha256(f"{seed} schedule {step}".encode()).digest()
    targets = schedules[int.from_bytes(mixed[:7], "little") % len(schedules)]
    if settings.anneal.fraction is None:
        return targets
    # The last step at the latest is at the target.
    ramp = max(1, round(settings.anneal.fraction * (settings.steps - 1)))
    return [annealed(target, length, step / ramp, settings.anneal.shape) for target in targets]


def annealed(target: int | float, length: int, progress: float, shape: str) -> int | float:
    """A TransPoint on its way from infinity (at progress 0: the teacher) to `target` (at progress 1 and after).

    In between it falls from `length`, which is as good as infinity for sequences so long: `linear`ly, or `log`: by the
    same factor in equal times (of T + 1, so that a target of 0 can be reached).
    """
    if progress <= 0:
        return math.inf
    if progress >= 1 or target >= length:
        return target
    if shape == "linear":
        return round(length + (target - length) * progress)
    return round((length + 1) ** (1 - progress) * (target + 1) ** progress) - 1


def check_schedules(recipe: Recipe, num_layers: int, longest: int | None = 1) -> dict[str, list[TransPoints]]:
    """The schedules that a recipe names for a student of so many layers, by key; none for one without TransPoints.

    Args:
        longest: the longest sequence the model was made for, which "log" needs; any number serves to check alone.

    Raises:
        StudentError: one that is none, with its key.
    """
    if not recipe.student.kind.trans_points:
        return {}
    named = {
        "student.trans_points": [recipe.student.trans_points],
        "distill.sample_schedules": recipe.distill.sample_schedules,
        "evaluate.schedules": recipe.evaluate.schedules or [],
    }
    found: dict[str, list[TransPoints]] = {key: [] for key in named}
    for key, specs in named.items():
        for spec in specs:
            try:
                found[key].append(parse_trans_points(spec, num_layers, longest))
            except StudentError as error:
                raise StudentError(f"{key}: {error}") from error
    return found


def never_distilled(recipe: Recipe, mixers: list[str], longest: int | None) -> str | None:
    """A line on the layers that no training sequence passes the TransPoint of; None where there are none."""
    schedules = check_schedules(recipe, len(mixers), longest)
    if not schedules:
        return None
    trained = zip(*schedules["student.trans_points"], *schedules["distill.sample_schedules"], strict=True)
    least = {min(points) for points, mixer in zip(trained, mixers, strict=True) if have_trans_points([mixer])}
    never = sorted(point for point in least if recipe.data.length <= point < math.inf)
    if not never:
        return None
    return (
        f"data.length is {recipe.data.length:,}: distill never reaches the state-space form of layers with TransPoints "
        f"of {', '.join(map(str, never))}; raise data.length, or lower them"
    )


def resolve(student: HybridForCausalLM, specs: list) -> dict[str, TransPoints]:
    """The schedules that these specs mean for this student, by name, each once; kept attention is infinity there.

    Raises:
        StudentError: a spec that is none.
    """
    found: dict[str, TransPoints] = {}
    for spec in specs:
        with at_trans_points(student, spec):
            if student.trans_points not in found.values():
                found[describe(spec)] = list(student.trans_points)
    return found


@contextmanager
def at_trans_points(student: HybridForCausalLM, spec=None) -> Iterator[None]:
    """The student at another schedule for a while; None: whatever it is set to meanwhile, it goes back in the end.

    A student without TransPoints stays as it is.
    """
    if not have_trans_points(student.config.mixers):
        yield
        return
    before = list(student.trans_points)
    try:
        if spec is not None:
            student.set_trans_points(spec, warn=False)
        yield
    finally:
        student.set_trans_points(before, warn=False)


def describe(spec) -> str:
    """A spec in a few words: a list that repeats itself only once."""
    if not isinstance(spec, list | tuple):
        return str(spec)
    points = [str(point) for point in spec]
    for period in range(1, len(points)):
        if all(points[i] == points[i % period] for i in range(len(points))):
            return f"[{', '.join(points[:period])}] cycled"
    return f"[{', '.join(points)}]"


# Cost


@dataclass(frozen=True)
class Cost:
    """What one sequence of `length` tokens costs."""

    length: int
    attention: float  # fraction of layer-tokens whose output attention computes
    cache_bytes: int  # held after the last of them
    prefill_seconds: float  # of all of them at once
    decode_seconds: float  # of one more token
    dtype: str
    device: str


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
