"""Several recipes on one teacher and one held-out text, at equal tokens: `transpoint compare`.

Each is a run in a folder of its own, so that a comparison that was interrupted goes on, and stages that two recipes
share (tokens, the same selection, the same alignment) run once.
"""

import dataclasses
import gc
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Recipe, load_recipe
from .errors import DistillError, RunError
from .run.files import read_json, write_json
from .run.folder import StageFolder
from .run.records import Measures, Quality, StageRecord, read_record
from .stages.inputs import lineage
from .stages.pipeline import pipeline_of

if TYPE_CHECKING:
    from rich.console import Console

    from .stages.stage import Stage

# What figures of two runs have to share if they are to be compared.
ALIKE = (
    "teacher.source",
    "teacher.revision",
    "teacher.sizes",
    "teacher.dtype",
    "data.heldout",
    "data.max_heldout_tokens",
    "data.length",
    "data.text_field",
    "data.messages_field",
    "data.bos",
    "evaluate",
    "run.seed",
)


@dataclass(frozen=True)
class Point:
    """A student on its way."""

    stage: str = ""
    tokens: int = 0  # that it was trained on
    quality: Quality | None = None


@dataclass(frozen=True)
class Compared:
    """What came of a recipe with one seed."""

    recipe: str = ""
    seed: int = 0
    points: list[Point] = field(default_factory=list)
    quality: Quality | None = None  # of the exported checkpoint
    measures: Measures | None = None
    seconds: float | None = None  # of its stages, those that it shares included


@dataclass(frozen=True)
class Comparison:
    tokens: int = 0
    teacher: Quality | None = None
    teacher_measures: Measures | None = None
    runs: list[Compared] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # by folder: why


def load_recipes(
    paths: list[str], overrides: list[str], base: str | None = None, tokens: int | None = None
) -> dict[str, Recipe]:
    """The recipes by name, each on top of `base` and under `overrides`, all at as many tokens.

    Raises:
        ConfigError: one of them is none.
        RunError: two have one name; they are not on one teacher and held-out text, are measured differently, or train
            on different numbers of tokens and `tokens` does not say on how many.
    """
    recipes: dict[str, Recipe] = {}
    for path in paths:
        if (name := Path(path).stem) in recipes:
            raise RunError(f"two recipes are called '{name}': give one of the files another name")
        recipes[name] = load_recipe(path, overrides, base)
    first, *others = recipes
    for name in others:
        both_scratch = recipes[name].from_scratch and recipes[first].from_scratch
        for key in ALIKE:
            if both_scratch and key.startswith("teacher."):  # of models without a teacher: those are what is compared
                continue
            if attrgetter(key)(recipes[name]) != attrgetter(key)(recipes[first]):
                raise RunError(
                    f"'{name}' and '{first}' differ in {key}: a comparison is on one teacher and one held-out text, "
                    f"all measured alike; set it for all with --base or {key}=..."
                )
    if tokens is not None:
        recipes = {name: at_tokens(recipe, tokens) for name, recipe in recipes.items()}
    totals = {name: training_tokens(recipe) for name, recipe in recipes.items()}
    # As near as whole steps come.
    if max(totals.values()) > 1.02 * min(totals.values()):
        said = ", ".join(f"{name} {total:,}" for name, total in totals.items())
        remedy = "say on how many with --tokens" if tokens is None else "whole steps come no nearer: give more tokens"
        raise RunError(f"the recipes train on different numbers of tokens ({said}): {remedy}")
    return recipes


def training_tokens(recipe: Recipe) -> int:
    """Tokens of all stages that train."""
    stages = [stage for stage in pipeline_of(recipe) if stage.trains]
    return sum(stage.of(recipe).steps * _tokens_of_a_step(stage, recipe) for stage in stages)


def _tokens_of_a_step(stage: "Stage", recipe: Recipe) -> int:
    return stage.of(recipe).batch_size * recipe.length_in(stage.name)


def at_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """The same with as many training tokens in all, its stages in proportion. Raises RunError where it trains none."""
    total, recipe = training_tokens(recipe), dataclasses.replace(recipe)
    if total == 0:
        raise RunError("a recipe without steps cannot be given tokens: set those of its stages, as distill.steps")
    left = tokens
    stages = [stage for stage in pipeline_of(recipe) if stage.trains and stage.of(recipe).steps]
    for stage in stages:
        settings = stage.of(recipe)
        step = _tokens_of_a_step(stage, recipe)
        share = left if stage is stages[-1] else settings.steps * step * tokens / total
        steps = max(1, round(share / step))
        setattr(recipe, stage.name, dataclasses.replace(settings, steps=steps))
        left -= steps * step
    return recipe


def compare(
    recipes: dict[str, Recipe], out: Path, seeds: int = 1, console: "Console | None" = None
) -> tuple[Comparison, bool]:
    """Runs each recipe with so many seeds, from its own on; writes `comparison.json` in `out` after each run.

    A run that fails leaves the others be: `failed` says why. One that is stopped stops all.

    Returns:
        The comparison, and whether this is the process that writes.
    """
    from accelerate import PartialState

    from ..students.modeling.errors import StudentError
    from ..teachers.errors import TeacherError
    from .stages.runner import run_recipe
    from .train.trainer import Stopped

    found = Comparison(max(map(training_tokens, recipes.values())))
    folders: list[Path] = []
    for number in range(seeds):
        for name, recipe in recipes.items():
            seed = recipe.run.seed + number
            folder = out / f"{name}-seed{seed}"
            reuse = [*recipe.run.reuse, *map(str, folders)]
            run = dataclasses.replace(recipe.run, dir=str(folder), seed=seed, reuse=reuse)
            data = dataclasses.replace(recipe.data, cache=recipe.data.cache or str(out / ".data"))
            try:
                run_recipe(dataclasses.replace(recipe, run=run, data=data), console=console)
            except Stopped:
                raise
            except (DistillError, StudentError, TeacherError, MemoryError, RuntimeError) as error:
                found.failed[folder.name] = " ".join(str(error).split()) or type(error).__name__
            else:
                folders.append(folder)
                found = _with(found, name, seed, folder)
            _release()
            if PartialState().is_main_process and out.is_dir():
                write_json(out / "comparison.json", found)
    return found, PartialState().is_main_process


def _with(found: Comparison, name: str, seed: int, folder: Path) -> Comparison:
    """The comparison with one more run."""
    records, points, tokens = lineage(folder), [], 0
    for stage, record in records.items():
        if record.training is not None:
            tokens += record.training.tokens or 0
        if record.quality is not None and stage != "evaluate":
            points.append(Point(stage, tokens, record.quality))
    last = records.get("evaluate", StageRecord())
    seconds = sum(StageFolder(folder, stage).record.stage_seconds or 0 for stage in records)
    own = Compared(name, seed, points, last.quality, last.measures.get("student"), seconds)
    teacher = read_record(Quality, read_json(folder / "teacher_quality.json"))
    measures = last.measures.get("teacher")
    return dataclasses.replace(found, teacher=teacher, teacher_measures=measures, runs=[*found.runs, own])


def _release() -> None:
    """What a run held goes, so that the next one has the device's memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
