"""The run folder's records: what makes a stage's result valid, and that nothing is ever half-written."""

import json
import os

import pytest
from hypothesis import given, strategies as st

from transpoint.distill.errors import RunError
from transpoint.distill.run.files import read_json, write_json
from transpoint.distill.run.folder import StageFolder, truncate_log
from transpoint.distill.run.identity import file_identity, identity

NEEDS = {"align": {"steps": 20, "betas": [0.9, 0.95], "micro": None}, "after": {"calibrate": "abc"}}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path, "align")


def changed(**changes):
    return {**NEEDS, "align": {**NEEDS["align"], **changes}}


# Identity


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_identity_is_that_of_the_content(value):
    again = json.loads(json.dumps(dict(reversed(list(value.items())))))  # as it comes back from a file
    assert identity(value) == identity(again) and len(identity(value)) == 16
    assert identity({**value, "one more": 1}) != identity(value)


@pytest.mark.parametrize(
    "other", [changed(steps=21), changed(betas=[0.95, 0.9]), changed(micro=0), changed(extra=None)]
)
def test_identity_tells_changes_apart(other):
    assert identity(other) != identity(NEEDS)


def test_file_identity(tmp_path, monkeypatch):
    commit = "0" * 40
    assert file_identity("owner/name", commit) == {"hub": "owner/name", "commit": commit}
    assert file_identity("random-llama") == "random-llama"
    file = tmp_path / "teacher" / "config.json"
    file.parent.mkdir()
    file.write_text("{}")
    large = tmp_path / "teacher" / "model.safetensors"
    large.write_bytes(bytes(2**21))
    (tmp_path / "teacher" / "folder").mkdir()
    found = file_identity(str(file.parent))
    assert [entry[0] for entry in found] == ["config.json", "model.safetensors"]
    large.write_bytes(bytes(2**21 - 1) + b"x")  # other weights of the same size
    changed = file_identity(str(file.parent))
    assert changed[0] == found[0] and changed[1] != found[1]
    found = changed
    assert file_identity(str(file)) == found[:1]
    file.write_text("[]")
    assert file_identity(str(file.parent))[0] != found[0]
    file.write_text("{}")
    os.rename(large, large.with_name("other.safetensors"))
    assert file_identity(str(file.parent))[0] == found[0] and file_identity(str(file.parent))[1] != found[1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_identity("~/teacher/config.json") == found[:1]


# Why a stage must run


def test_reasons_to_run(folder):
    assert folder.why_not_reusable(NEEDS) == "not run yet"
    folder.begin(NEEDS)
    assert folder.why_not_reusable(NEEDS) == "interrupted"
    folder.finish({"quality": 1})
    assert folder.why_not_reusable(NEEDS) is None
    assert folder.why_not_reusable(changed(steps=30)) == "changed: align.steps (20 -> 30)"
    assert folder.why_not_reusable(changed(micro=2)) == "changed: align.micro (null -> 2)"
    assert folder.why_not_reusable(changed(betas=[0.9, 0.99])) == "changed: align.betas ([0.9, 0.95] -> [0.9, 0.99])"
    assert folder.why_not_reusable({**NEEDS, "after": {"calibrate": "xyz"}}) == ("changed: what calibrate made")
    assert folder.why_not_reusable({"align": NEEDS["align"]}) == "changed: the stage before (calibrate -> none)"
    assert folder.why_not_reusable(changed(betas=["x" * 50])) == "changed: align.betas ([0.9, 0.95] -> ...)"
    many = changed(**{f"key{i}": i for i in range(6)}, steps=1)
    assert folder.why_not_reusable(many) == (
        "changed: align.key0 (null -> 0), align.key1 (null -> 1), align.key2 (null -> 2), align.key3 (null -> 3) "
        "and 3 more"
    )


@pytest.mark.parametrize("name, reason", [("stage.json", "not run yet"), ("done.json", "interrupted")])
def test_a_damaged_record_counts_as_none(folder, name, reason):
    folder.begin(NEEDS)
    folder.finish({})
    (folder / name).write_text((folder / name).read_text()[:-3])
    assert folder.why_not_reusable(NEEDS) == reason


# Beginning and finishing


@pytest.mark.parametrize(
    "needs, kept", [(NEEDS, True), (json.loads(json.dumps(NEEDS)), True), (changed(steps=5), False)]
)
def test_an_interrupted_start_is_kept_if_it_depends_on_the_same(folder, needs, kept):
    folder.begin(NEEDS)
    (folder / "checkpoints").mkdir()
    folder.begin(needs)
    assert (folder / "checkpoints").exists() == kept
    assert folder.started == json.loads(json.dumps(needs))


def test_a_done_stage_begins_anew(folder):
    folder.begin(NEEDS)
    (folder / "model").mkdir()
    folder.finish({"quality": 1})
    folder.begin(NEEDS)
    assert not (folder / "model").exists() and folder.done is None


def test_finish_records_and_drops_checkpoints(folder):
    folder.begin(NEEDS)
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    folder.finish({"quality": {"kl": 0.5}})
    assert folder.done["quality"] == {"kl": 0.5} and folder.done["finished"].startswith("20")
    assert sorted(p.name for p in folder.path.iterdir()) == ["done.json", "stage.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(RunError) as caught:
        StageFolder(tmp_path / "run", "align").begin(NEEDS)
    assert str(caught.value).startswith("the run folder cannot be written: ")
    assert str(caught.value).endswith("; set run.dir to another place")


# Files


@given(json_values)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("failure", ["value", "disk", "move", "interrupt"])
def test_a_failed_write_leaves_the_old_file(failure, tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_json(path, {"old": 1})

    def fail(error):
        def raise_it(*args):
            raise error

        return raise_it

    value, expected = {"new": 2}, OSError
    if failure == "value":
        value, expected = {"new": object()}, TypeError
    elif failure == "disk":
        monkeypatch.setattr(os, "fsync", fail(OSError(28, "No space left on device")))
    elif failure == "move":
        monkeypatch.setattr(os, "replace", fail(OSError(13, "Permission denied")))
    else:
        expected = KeyboardInterrupt
        monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    with pytest.raises(expected):
        write_json(path, value)
    assert read_json(path) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["done.json"]


def test_reading_what_is_not_there_or_damaged(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    (tmp_path / "cut.json").write_text('{"a": ')
    assert read_json(tmp_path / "cut.json") is None
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert read_json(tmp_path / "binary.json") is None


@pytest.mark.parametrize("last, kept", [(0, []), (5, [5]), (7, [5]), (10, [5, 10]), (99, [5, 10, 15])])
@pytest.mark.parametrize("tail", ["", '{"step": 20, "lo'])
def test_the_log_is_cut_after_a_step(folder, last, kept, tail):
    folder.begin(NEEDS)
    for step in (5, 10, 15):
        folder.log({"step": step, "loss": 0.5})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + tail)  # a line cut off by a crash
    truncate_log(path, last)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
    folder.log({"step": 99, "loss": 0.5})
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 99


def test_no_log_is_no_trouble(folder):
    truncate_log(folder / "metrics.jsonl", 3)
    assert not (folder / "metrics.jsonl").exists()
