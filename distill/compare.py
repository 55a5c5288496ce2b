"""Several recipes on one teacher and one held-out text, at equal tokens: `transpoint compare`.

Each is a run in a folder of its own, so that a comparison that was interrupted goes on, and stages that two recipes
share (tokens, the same selection, the same alignment) run once.
"""

import dataclasses
import gc
from dataclasses import dataclass, field
from pathlib import Path

from .config import Recipe, load_recipe
from .errors import DistillError, RunError
from .run.files import read_json, write_json
from .run.folder import StageFolder
from .run.records import Measures, Quality, StageRecord, read_record
from .stages.inputs import lineage
from .stages.pipeline import pipeline_of


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
        for key in ("teacher.source", "data.heldout", "data.max_heldout_tokens", "evaluate"):
            own, wanted = (_at(recipes[one], key) for one in (name, first))
            if own != wanted:
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
        raise RunError(f"the recipes train on different numbers of tokens ({said}): say on how many with --tokens")
    return recipes


def training_tokens(recipe: Recipe) -> int:
    """Tokens of all stages that train."""
    stages = [stage.of(recipe) for stage in pipeline_of(recipe) if stage.trains]
    return sum(stage.steps * stage.batch_size for stage in stages) * recipe.data.length


def at_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """The same with as many training tokens in all, its stages in proportion. Raises RunError where it trains none."""
    total, recipe = training_tokens(recipe), dataclasses.replace(recipe)
    if total == 0:
        raise RunError("a recipe without steps cannot be given tokens: set align.steps and distill.steps")
    left = tokens
    stages = [stage for stage in pipeline_of(recipe) if stage.trains and stage.of(recipe).steps]
    for stage in stages:
        settings = stage.of(recipe)
        step = settings.batch_size * recipe.data.length
        share = left if stage is stages[-1] else settings.steps * step * tokens / total
        steps = max(1, round(share / step))
        setattr(recipe, stage.name, dataclasses.replace(settings, steps=steps))
        left -= steps * step
    return recipe


def compare(recipes: dict[str, Recipe], out: Path, seeds: int = 1, console=None) -> Comparison:
    """Runs each recipe with seeds 0, 1, ...; writes `comparison.json` in `out` after each run.

    A run that fails leaves the others be: `failed` says why.
    """
    from .stages.runner import run_recipe

    tokens = max(map(training_tokens, recipes.values()))
    found = Comparison(tokens)
    folders: list[Path] = []
    for seed in range(seeds):
        for name, recipe in recipes.items():
            folder = out / (name if seeds == 1 else f"{name}-seed{seed}")
            run = dataclasses.replace(
                recipe.run, dir=str(folder), seed=seed, reuse=[*recipe.run.reuse, *map(str, folders)]
            )
            data = dataclasses.replace(recipe.data, cache=recipe.data.cache or str(out / "data"))
            one = dataclasses.replace(recipe, run=run, data=data)
            try:
                main = run_recipe(one, console=console).accelerator.is_main_process
            except DistillError as error:
                found.failed[folder.name] = " ".join(str(error).split())
                continue
            finally:
                _release()
            folders.append(folder)
            found = _with(found, name, seed, folder)
            if main:
                write_json(out / "comparison.json", found)
    return found


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


def _at(recipe: Recipe, key: str):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def _release() -> None:
    """What a run held goes, so that the next one has the device's memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
