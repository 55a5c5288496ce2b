"""Runs of configs/tiny.yaml and its TransMamba variant through every stage, made once.

Tests read them, and those that change one take a copy.
"""

import dataclasses
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

import fresh
from run_files import TINY
from transpoint.distill.config import load_recipe
from transpoint.distill.export import verify
from transpoint.distill.export.formats import FORMATS, find_format
from transpoint.distill.stages.pipeline import PIPELINE
from transpoint.distill.stages.runner import run_recipe


def _run_tiny(folder, *overrides, config=TINY, **options):
    out = io.StringIO()
    recipe = load_recipe(config, [f"run.dir={folder}", *overrides])
    run_recipe(recipe, console=Console(file=out, width=200), **options)
    return out.getvalue()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps device and precision for the process: here each test has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="session")
def forked_checks():
    """Export's own check is in a process that has transformers already; some tests start one of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", SimpleNamespace(run=fresh.run))
        yield


@pytest.fixture
def pipeline():
    """The stages, to be changed meanwhile."""
    before = list(PIPELINE)
    yield PIPELINE
    PIPELINE[:] = before


@pytest.fixture
def unverified(monkeypatch):
    """Leaves out export's own check in a fresh process, of which it is the figures: the test is of something else."""
    figures = {"logits": 1e-6, "decode": 2e-6, "scale": 10.0}
    for name in FORMATS:
        unchecked = dataclasses.replace(find_format(name), check=lambda *args: dict(figures))
        monkeypatch.setitem(FORMATS, name, unchecked)
    return figures


@pytest.fixture(scope="session")
def run_tiny():
    """run_tiny(folder, *overrides, **options of run_recipe): runs configs/tiny.yaml there, returns what it printed.

    `config`: another recipe.
    """
    return _run_tiny


@pytest.fixture(scope="session")
def tiny_output(tmp_path_factory):
    """(run folder, what the run printed). Only to be read."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    return folder, _run_tiny(folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_output):
    """The run folder. Only to be read."""
    return tiny_output[0]


@pytest.fixture
def tiny_copy(tiny_run, tmp_path):
    """A run folder of one's own, every stage done."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))
