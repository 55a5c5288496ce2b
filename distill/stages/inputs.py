"""What the result of each stage depends on, and which of a run's records follow from one another."""

from pathlib import Path
from typing import Any

from ..config import ConfigError, Recipe, load_recipe
from ..data.sources import DataError, source_identity
from ..errors import RunError
from ..run.files import sha256
from ..run.folder import StageFolder
from ..run.identity import file_identity, identity, without_resultless
from ..run.records import StageRecord, read_record
from .pipeline import names, pipeline_of
from .transfer import TRANSFER, start_folder
from .tune import TUNE


def stage_inputs(recipe: Recipe) -> dict[str, dict]:
    """For each stage, all that its result depends on: settings, seed, files, what it does, and the stage before it."""
    settings, defaults = recipe.to_dict(), Recipe().to_dict()
    for name in ("train", "heldout"):
        if not settings["data"][name]:
            raise DataError(f"data.{name} is empty: list files, folders or hub:OWNER/NAME there")
    text = {
        "train": [source_identity(source, sampled=recipe.data.streaming) for source in recipe.data.train],
        "heldout": [source_identity(source) for source in recipe.data.heldout],
    }
    needs: dict[str, dict] = {}
    before = None
    stages = pipeline_of(recipe)
    last = max(i for i, stage in enumerate(stages) if stage.makes_student)
    for i, stage in enumerate(stages):
        trains = i <= last
        own: dict[str, Any] = {name: dict(settings[name]) for name in stage.reads} | {"code": stage.code}
        for key in stage.unread(recipe):
            section, _, name = key.partition(".")
            if name:
                own[section][name] = defaults[section][name]
            else:
                del own[section]
        if "data" in own:
            own["data"] |= text
            # What is trained does not depend on what it is measured on.
            unread = ["heldout", "max_heldout_tokens"] if trains else []
            if not (trains and recipe.data.streaming):
                unread += ["streaming", "shuffle_buffer"]
            for name in unread:
                del own["data"][name]
        if "distill" in own and recipe.distill.teacher_cache:
            own["distill"]["teacher_cache"] = _cache_identity(recipe.distill.teacher_cache)
        if TUNE.name in own:
            own[TUNE.name]["train"] = [source_identity(source) for source in TUNE.of(recipe).train]
        if "evaluate" in own and recipe.evaluate.questions:
            own["evaluate"]["questions"] = source_identity(recipe.evaluate.questions)
        if "evaluate" in own and recipe.evaluate.tasks and recipe.evaluate.tasks_folder:
            files = sorted(Path(recipe.evaluate.tasks_folder).glob("*.*"))
            own["evaluate"]["tasks_folder"] = [[file.name, sha256(file)] for file in files if file.is_file()]
        if TRANSFER.name in own:
            own[TRANSFER.name]["start"] = file_identity(str(start_folder(recipe)))
        if "teacher" in own:
            own["teacher"]["files"] = file_identity(recipe.teacher.source, recipe.teacher.revision)
            del own["teacher"]["training_dtype"]  # which counts where something is trained
            if recipe.from_scratch:
                own["run"] = {"seed": recipe.run.seed}
        if stage.trains:
            own["run"] = {"seed": recipe.run.seed, "precision": recipe.run.precision}
            own["teacher"] = {"training_dtype": recipe.teacher.training_dtype}
        if stage.in_precision:
            own["run"] = {"precision": recipe.run.precision}
            own["teacher"]["training_dtype"] = recipe.teacher.training_dtype
        own = without_resultless(own)
        if before is not None:
            own["after"] = {before: identity(needs[before])}
        needs[stage.name] = own
        before = stage.name
    return needs


def lineage(root: Path) -> dict[str, StageRecord]:
    """The records of a run that follow from one another, by stage: what came of earlier settings is left out."""
    try:
        recipe = load_recipe(root / "recipe.yaml")
    except ConfigError:  # there is none, or not one of today's
        recipe = Recipe()
    found: dict[str, StageRecord] = {}
    before = None
    for stage in pipeline_of(recipe):
        folder = StageFolder(root, stage.name)
        started, done = folder.started, folder.done
        if done is None or started is None or (started.get("after") or {}) != (before or {}):
            break
        found[stage.name] = read_record(StageRecord, done)
        before = {stage.name: identity(started)}
    return found


def latest_student(root: Path) -> Path:
    """The folder of the last student that a run has finished. Raises RunError where there is none."""
    done = lineage(root)
    for stage in reversed(names(lambda stage: stage.makes_student)):
        if stage in done:
            return root / stage / "student"
    raise RunError(f"'{root}' has no finished student yet; run `transpoint run {root / 'recipe.yaml'}`")


def _cache_identity(folder: str):
    from ..data.teacher_cache import cache_identity  # which loads what `transpoint status` does without

    return cache_identity(folder)


def finished_elsewhere(recipe: Recipe, stage: str, depends_on: dict) -> StageFolder | None:
    """The folder of a run in `run.reuse` that has finished a stage which depends on just this."""
    folders = (StageFolder(Path(root).expanduser(), stage) for root in recipe.run.reuse)
    return next((folder for folder in folders if folder.why_not_reusable(depends_on) is None), None)
