"""A run of configs/tiny.yaml through every stage, made once: tests read it, and those that change it take a copy."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from transpoint.distill.config import load_recipe
from transpoint.distill.stages import run_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"


def run_tiny(folder, *overrides, **options):
    """Runs configs/tiny.yaml in `folder`; returns what it printed."""
    out = io.StringIO()
    options.setdefault("console", Console(file=out, width=200))
    run_recipe(load_recipe(TINY, [f"run.dir={folder}", *overrides]), **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def tiny_output(tmp_path_factory):
    """(run folder, what the run printed). Only to be read."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return folder, run_tiny(folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_output):
    """The run folder. Only to be read."""
    return tiny_output[0]


@pytest.fixture
def tiny_copy(tiny_run, tmp_path):
    """A run folder of one's own, every stage done."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))
