"""Records that are damaged, or of earlier versions: read for what is whole in them, refused where nothing is."""

import json
import math

import pytest

from run_files import without_logs
from transpoint.distill.cli import main
from transpoint.distill.run.records import Quality, ScheduleRecord, StageRecord, Training, read_record


@pytest.mark.parametrize("value", [None, [], 3, "x", [{"quality": {}}]])
def test_what_is_no_record_is_empty(value):
    assert read_record(StageRecord, value) == StageRecord()


def test_what_is_of_another_type_is_as_if_it_were_not_there():
    quality = {"kl": "high", "perplexity": 10**400, "same_top": True, "tokens": 7.0, "bits_per_byte": math.inf}
    record = {
        "quality": quality,
        "mixers": ["mamba2", 3, "attention"],
        "verified": {"logits": 1e-6, "decode": None},
        "schedules": [None, {"schedule": "mamba"}, 3],
        "training": [],
    }
    found = read_record(StageRecord, record)
    assert found.quality == Quality(tokens=7, bits_per_byte=math.inf)
    assert found.mixers == [] and found.verified == {"logits": 1e-6} and found.training is None
    assert found.schedules == [ScheduleRecord("mamba")]


def test_fields_of_earlier_versions():
    record = {"training": {"tokens": 9, "left_out": 2}, "schedules": {"mamba": [0, 0]}}
    found = read_record(StageRecord, record)
    assert found.training == Training(9, 2) and found.trained_schedules == {"mamba": [0, 0]} and found.schedules == []


@pytest.fixture
def say(capsys, monkeypatch):
    """What a command exits with, and prints."""
    monkeypatch.setenv("COLUMNS", "400")

    def say(*arguments):
        code = main(list(map(str, arguments)))
        return code, "".join(capsys.readouterr())

    return say


def test_figures_that_are_not_finite_are_shown_as_they_are(tiny_copy, say):
    for stage, name, value in (("transfer", "perplexity", math.inf), ("distill", "kl", math.nan)):
        record = json.loads((tiny_copy / stage / "done.json").read_text())
        record["quality"][name] = value
        (tiny_copy / stage / "done.json").write_text(json.dumps(record))
    code, out = say("run", tiny_copy / "recipe.yaml", f"run.dir={tiny_copy}")
    assert code == 0 and " inf " in out and " nan " in out
    code, out = say("status", tiny_copy)
    assert code == 0 and " nan " in out
    assert say("report", without_logs(tiny_copy))[0] == 0


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 100_000])
def test_a_stage_whose_record_is_none_has_not_finished(content, tiny_copy, say):
    (tiny_copy / "align" / "done.json").write_text(content)
    code, out = say("status", tiny_copy)
    rows = [line.split("│") for line in out.splitlines() if line.count("│") > 2]
    assert code == 0 and [row[2].strip() for row in rows if row[1].strip() == "align"] == ["would run: interrupted"]
    assert say("report", without_logs(tiny_copy))[0] == 0


@pytest.mark.parametrize("after", [[1], 3, "x"])
def test_a_damaged_start_counts_as_another(after, tiny_copy, say):
    started = json.loads((tiny_copy / "align" / "stage.json").read_text())
    (tiny_copy / "align" / "stage.json").write_text(json.dumps(started | {"after": after}))
    code, out = say("status", tiny_copy)
    assert code == 0 and "changed: the stage before (none -> calibrate)" in out
    assert say("report", without_logs(tiny_copy))[0] == 0
