"""Where tests find the recipes, and what they read in a run folder."""

import json
from pathlib import Path

from transpoint.distill.config import Recipe
from transpoint.distill.stages.pipeline import pipeline_of

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = CONFIGS / "tiny.yaml"

STAGES = [stage.name for stage in pipeline_of(Recipe())]  # of a run that asks for no more
VARIES = {"tokens_per_second", "mfu", "memory"}  # the latter two on GPUs only


def done(folder, stage):
    """The record of a finished stage."""
    return json.loads((folder / stage / "done.json").read_text())


def metrics(folder, stage):
    """The lines of a stage's log, without what differs between two equal runs."""
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VARIES} for line in lines]


def student(folder, stage):
    """The bytes of a stage's weights."""
    return (folder / stage / "student" / "model.safetensors").read_bytes()


def without_logs(folder):
    """Empties the logs of training, of which a report draws most of its charts: a page without is made sooner."""
    for log in folder.glob("*/metrics.jsonl"):
        log.write_bytes(b"")
    return folder
