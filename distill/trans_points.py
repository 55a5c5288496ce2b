"""At which TransPoints a TransMamba student trains in each step.

Everything here that training reads is a pure function of the recipe and the step, so that a resumed run is the same.
Schedules are lists with one TransPoint for each layer: tokens, or `math.inf` (attention throughout).
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

from ..students import HybridForCausalLM, StudentError, parse_trans_points
from ..students.modeling.configuration_mixers import have_trans_points
from ..students.modeling.configuration_transmamba import written
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
    stage = "train" if recipe.from_scratch else "distill"
    length = recipe.length_in(stage)
    never = sorted(point for point in least if length <= point < math.inf)
    if not never:
        return None
    setting = f"{stage}.length" if getattr(recipe, stage).length else "data.length"
    return (
        f"{setting} is {length:,}: {stage} never reaches the state-space form of layers with "
        f"TransPoints of {', '.join(map(str, never))}; raise {setting}, or lower them"
    )


def mark_trained(student: HybridForCausalLM, schedules: dict[str, TransPoints]) -> dict[str, list]:
    """Has the student's config say on which schedules it is trained, by name; returns them as they are written."""
    trained = {name: written(points) for name, points in schedules.items()}
    student.config.measured_trans_points = [
        {"schedule": name, "trans_points": points, "trained": True, "quality": None} for name, points in trained.items()
    ]
    return trained


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
