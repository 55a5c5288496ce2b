"""Uploading an export, alone or with the records of its run. The token is huggingface_hub's own business: it is never
read, kept or shown here."""

import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard

from ...teachers import TeacherInfo
from ..config import for_others
from ..errors import RunError
from ..report.page import write_report
from ..report.summary import card_facts
from ..run.records import StageRecord
from ..stages.inputs import lineage
from .card import recipe_text
from .formats import has_model

logger = logging.getLogger(__name__)


def push(folder: Path, repo_id: str, private: bool = False, run: Path | None = None) -> str:
    """Makes the repository if it is not there and uploads the folder; returns its address.

    What was uploaded before it was interrupted is not sent again by the next call.

    Args:
        folder: an export.
        repo_id: OWNER/NAME.
        private: whether the repository, if it is new, is for its owner alone.
        run: the run that made the export: with it go report.html, recipe.yaml (which names no place on this machine)
            and results.json, what *evaluate* measured, which the card has as `model-index` too.

    Raises:
        RunError: the folder is no finished export, the hub refuses, or it cannot be reached. One line.
    """
    for found, what in ((has_model(folder), "model"), ((folder / "README.md").is_file(), "README.md")):
        if not found:
            raise RunError(f"'{folder}' is no exported folder: it has no {what}")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise RunError(f"'{repo_id}' is no repository; expected OWNER/NAME")
    api = HfApi(library_name="transpoint")
    with tempfile.TemporaryDirectory() as scratch:
        if run is not None:
            folder = _with_records(folder, run, Path(scratch) / "model", repo_id)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            # Not `upload_large_folder`, which newer clients lack: they resume here.
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload a Transpoint export")
        except Exception as error:  # the client raises many kinds; each is one thing to a person
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"'{repo_id}' could not be uploaded: {line}; `hf auth login` or HF_TOKEN gives access"
            ) from error
    return f"{api.endpoint}/{repo_id}"


def _with_records(export: Path, run: Path, folder: Path, repo_id: str) -> Path:
    """Makes `folder`: the export, by links, and beside it what others want to see of the run."""
    shutil.copytree(export.resolve(), folder, copy_function=os.symlink)
    facts, evaluated = card_facts(run), lineage(run).get("evaluate")
    assert facts.recipe is not None  # a run has one
    text = recipe_text(facts.recipe)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    try:
        write_report(run, folder / "report.html", text)
    except RunError as error:  # what draws its charts is not installed
        logger.warning("report.html is left out: %s", error)
    if evaluated is not None:
        os.symlink((run / "evaluate" / "results.json").resolve(), folder / "results.json")
        _complete(folder / "README.md", facts.teacher, evaluated, for_others(facts.recipe)["data"]["heldout"], repo_id)
    return folder


def _complete(path: Path, teacher: TeacherInfo | None, evaluated: StageRecord, texts: list[str], repo_id: str) -> None:
    """Adds to the front matter of a card what was measured, and the teacher where it is not named."""
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.data.base_model = card.data.base_model or (teacher.hub_id if teacher else None)
    found = _results(evaluated, texts)
    if found:
        card.data.model_name, card.data.eval_results = repo_id.split("/")[1], found
    path.unlink()  # the link: the run's own card stays as it is
    card.save(path)


def _results(evaluated: StageRecord, texts: list[str]) -> list[EvalResult]:
    """What was measured of a checkpoint, as the hub has it."""
    found: list[tuple[str, str, str, str, float | None]] = []  # data set's id and name, metric's id and name, value
    if (quality := evaluated.quality) is not None:
        held_out = "held-out", ", ".join(texts)
        found.append((*held_out, "kl", "KL from the teacher, nats per token", quality.kl))
        found.append((*held_out, "perplexity", "perplexity", quality.perplexity))
    if (measures := evaluated.measures.get("student")) is not None:
        found += [(one.task, one.task, one.metric, one.metric, one.value) for one in measures.tasks]
    return [
        EvalResult("text-generation", dataset, named, metric, value, metric_name=called)
        for dataset, named, metric, called, value in found
        if value is not None and math.isfinite(value)
    ]
