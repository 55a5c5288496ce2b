"""Training figures in metrics.jsonl and in trackers, over interruptions."""

import json

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError, Recipe, load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.run.folder import StageFolder, truncate_log
from transpoint.distill.train.tracking import Tracking


class FakeTracker(GeneralTracker):
    """Takes down what it is told, in `made`."""

    name = "wandb"
    requires_logging_directory = False
    made: list["FakeTracker"] = []

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.settings, self.told, self.finished = project, options, None, [], False
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def made(monkeypatch):
    """The trackers made in place of Weights & Biases."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(FakeTracker, "made", [])
    return FakeTracker.made


@pytest.fixture
def stage(tmp_path):
    folder = StageFolder(tmp_path / "mine", "align")
    folder.begin({"align": 1})
    return folder


def tracking(folder, *names, step=None, accelerator=None):
    """As a stage that goes on from `step` makes it."""
    recipe = Recipe()
    recipe.run.trackers = list(names)
    log = Tracking(accelerator or Accelerator(cpu=True), recipe, folder.stage, folder)
    if step is not None:
        truncate_log(folder / "metrics.jsonl", step)
    return log


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_always_written(stage, made):
    log = tracking(stage)
    log.log({"step": 3, "loss": 0.5, "event": "a spike"})
    log.close()
    assert json.loads((stage / "metrics.jsonl").read_text()) == {"step": 3, "loss": 0.5, "event": "a spike"}
    assert not made and not (stage / "tracking.json").exists() and not (stage.path.parent / "tracking").exists()


def test_trackers_are_told_settings_and_figures(stage, made):
    log = tracking(stage, "wandb", "wandb")
    log.log({"step": 3, "loss": 0.5, "event": "a spike", "list": [1]})
    log.close()
    (tracker,) = made
    assert tracker.told == [(3, {"align/loss": 0.5, "align/event": "a spike"})] and tracker.finished
    assert tracker.settings["align.steps"] == 100 and tracker.settings["run.trackers"] == "['wandb', 'wandb']"
    assert tracker.project == "transpoint"
    assert tracker.options["name"].startswith("mine-align-") and tracker.options["group"] == "mine"
    log.log({"step": 4, "loss": 0.4})
    assert len(tracker.told) == 1 and steps(stage) == [3, 4]


def test_a_resumed_stage_tells_no_step_twice(stage, made):
    log = tracking(stage, "wandb")
    for step in range(1, 8):
        log.log({"step": step, "loss": 1 / step})
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed meanwhile
    stage.begin({"align": 1})
    log = tracking(stage, "wandb", step=5)
    assert steps(stage) == [1, 2, 3, 4, 5]
    log.log({"step": 6, "loss": 1 / 6})  # and killed again
    stage.begin({"align": 1})
    log = tracking(stage, "wandb", step=5)
    for step in range(6, 10):
        log.log({"step": step, "loss": 1 / step})
    first, second, third = made
    assert not second.told and [step for step, _ in third.told] == [8, 9] and third.settings is None
    assert third.options == second.options == first.options and steps(stage) == list(range(1, 10))


def test_a_stage_that_begins_anew_is_another_run(stage, made):
    tracking(stage, "wandb").log({"step": 1, "loss": 1.0})
    stage.begin({"align": 2})
    log = tracking(stage, "wandb")
    log.log({"step": 1, "loss": 2.0})
    first, second = made
    assert second.options["id"] != first.options["id"]
    assert second.told == [(1, {"align/loss": 2.0})] and second.settings


def test_other_processes_write_nothing(stage, made):
    class Other:
        is_main_process = False

    log = tracking(stage, "wandb", accelerator=Other())
    log.log({"step": 1, "loss": 1.0})
    log.close()
    assert not made and not (stage / "metrics.jsonl").exists()


def test_a_tracker_that_fails_costs_no_run(stage, made, caplog):
    log = tracking(stage, "wandb")

    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    made[0].log = fail
    log.log({"step": 1, "loss": 1.0})
    log.log({"step": 2, "loss": 1.0})
    assert steps(stage) == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (ConnectionError: no network): training goes on without it"
    ]


def test_a_tracker_that_does_not_start(stage, made, monkeypatch):
    def fail(self):
        raise ConnectionError("no API key")

    monkeypatch.setattr(FakeTracker, "start", fail)
    with pytest.raises(RunError, match=r"run.trackers: wandb does not start \(ConnectionError: no API key\); leave it"):
        tracking(stage, "wandb")


def test_tensorboard(stage):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown():
        events = EventAccumulator(str(stage.path.parent / "tracking" / "align"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars("align/loss")]

    log = tracking(stage, "tensorboard")
    for step in range(1, 5):
        log.log({"step": step, "loss": float(step)})
    log.close()
    log = tracking(stage, "tensorboard", step=2)
    for step in range(3, 7):
        log.log({"step": step, "loss": float(step)})
    log.close()
    assert shown() == [(step, float(step)) for step in range(1, 7)]
    stage.begin({"align": 2})
    log = tracking(stage, "tensorboard")
    log.log({"step": 1, "loss": 9.0})
    log.close()
    assert shown() == [(1, 9.0)]


def test_names_are_checked_early(tmp_path, capsys, monkeypatch):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}, trackers: [wandb, tensorbord]}}")
    with pytest.raises(ConfigError, match="run.trackers holds 'tensorbord'; .* did you mean 'tensorboard'"):
        load_recipe(config)
    monkeypatch.setattr("transpoint.distill.train.tracking._INSTALLED", {"trackio": lambda: False})
    assert main(["run", str(config), "run.trackers=[trackio]"]) == 1
    assert "run.trackers names trackio, which is not installed: pip install trackio" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
