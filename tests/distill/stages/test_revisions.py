"""Runs of a teacher and of text from a hub: what they depend on is the commits, whatever names led to them."""

import json
import shutil

import pytest
from huggingface_hub import constants

from fake_hub import GATED, FakeHub, as_the_hub
from run_files import STAGES, TINY, done
from transpoint.distill.config import load_recipe
from transpoint.distill.data.sources import DataError
from transpoint.distill.run import identity as identities
from transpoint.distill.run.files import read_json, write_json
from transpoint.distill.run.folder import StageFolder
from transpoint.distill.run.identity import identity
from transpoint.distill.stages.inputs import lineage, stage_inputs
from transpoint.teachers import TeacherError
from transpoint.teachers.hub import hub_commit
from transpoint.teachers.random import random_teacher

TEACHER = "teacher.source=owner/teacher"
TEXT = "data.heldout=[hub:owner/text]"


@pytest.fixture
def hub(tmp_path):
    server = FakeHub()
    server.first = server.commit("owner/teacher", {"config.json": b"{}"})
    server.text = server.commit("datasets/owner/text", {"README.md": b"one"})
    with as_the_hub(server, tmp_path / "cache"):
        yield server
    server.stop()


def later():
    """What one process has been told of commits is nothing to the next."""
    hub_commit.cache_clear()
    identities._present.cache_clear()


def needs(*overrides):
    later()
    return stage_inputs(load_recipe(TINY, [TEACHER, *overrides]))


@pytest.fixture
def run(hub, tmp_path):
    """A run whose stages are all done, as far as its records say."""
    for stage, own in needs(TEXT).items():
        StageFolder(tmp_path / "run", stage).begin(own)
        StageFolder(tmp_path / "run", stage).finish({})
    return tmp_path / "run"


def stale(run, *overrides):
    now = needs(*(overrides or (TEXT,)))
    reasons = {stage: StageFolder(run, stage).why_not_reusable(own) for stage, own in now.items()}
    return {stage: reason for stage, reason in reasons.items() if reason is not None}


def test_a_branch_that_moves_on_makes_stages_stale(hub, run):
    assert stale(run) == {}
    second = hub.commit("owner/teacher", {"config.json": b"{ }"})
    found = stale(run)
    assert list(found) == list(STAGES)
    assert found["transfer"] == f'changed: teacher.files.commit ("{hub.first}" -> "{second}")'
    assert found["calibrate"] == "changed: what transfer made"
    # Whatever led to a commit: it is the one of the run.
    assert stale(run, TEXT, f"teacher.revision={hub.first}") == {}
    hub.branches["owner/teacher"]["v1"] = hub.first
    assert stale(run, TEXT, "teacher.revision=v1") == {}
    assert list(stale(run, TEXT, "teacher.revision=main")) == list(STAGES)


def test_text_that_moves_on_makes_stale_what_reads_it(hub, run):
    second = hub.commit("datasets/owner/text", {"README.md": b"two"})
    assert stale(run) == {"evaluate": f'changed: data.heldout ("{hub.text}" -> "{second}")'}
    assert stale(run, f"data.heldout=[hub:owner/text@{hub.text}]") == {}
    assert list(stale(run, "data.heldout=[hub:owner/text@main]")) == ["evaluate"]


@pytest.mark.parametrize("gone", ["offline", "unreachable"])
def test_without_the_hub_a_run_goes_on_with_what_is_cached(gone, hub, run, monkeypatch, tmp_path):
    if gone == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.stop()
    assert stale(run) == {}
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="^dataset 'owner/text' cannot be looked up .*: check the network, or name a"):
        stale(run)


def test_what_is_not_open_to_us_is_said_before_anything_runs(hub, run):
    before = {path: path.read_bytes() for path in run.rglob("*.json")}
    with pytest.raises(
        DataError, match=r"^dataset 'owner/text' has no revision 'v9' on the hub: name a branch, [^\n]*$"
    ):
        stale(run, "data.heldout=[hub:owner/text@v9]")
    hub.refuse = GATED
    with pytest.raises(
        DataError, match=rf"^dataset 'owner/text' is gated: ask for access at {hub.url}/datasets/owner/text;"
    ):
        stale(run)
    with pytest.raises(
        TeacherError, match=rf"^teacher 'owner/teacher' is gated: ask for access at {hub.url}/owner/teacher;"
    ):
        stale(run, "data.heldout=[configs/sample/heldout.jsonl.zst]")
    assert before == {path: path.read_bytes() for path in run.rglob("*.json")}


def test_a_run_of_an_earlier_version_is_reused(hub, run):
    """It knew no commits: what is there now is taken for what it read."""
    after = None
    for stage in STAGES:
        folder = StageFolder(run, stage)
        own = {name: value for name, value in folder.started.items() if name != "after"}
        if "files" in own.get("teacher", {}):
            own["teacher"]["files"] = "owner/teacher"
        if "heldout" in own.get("data", {}):
            own["data"]["heldout"] = [["hub:owner/text"]]
        write_json(folder / "stage.json", own | ({"after": after} if after else {}))
        after = {stage: identity(read_json(folder / "stage.json"))}
    assert stale(run) == {} and list(lineage(run)) == list(STAGES)
    hub.commit("owner/teacher", {"config.json": b"{ }"})
    assert stale(run) == {}
    hub.stop()
    assert list(lineage(run)) == list(STAGES)


def test_a_run_records_the_commit(hub, run_tiny, tmp_path):
    model, tokenizer = random_teacher("random-llama")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    commit = hub.commit("owner/teacher", files, "v1")
    run_tiny(tmp_path / "run", TEACHER, "teacher.revision=v1", until_stage="transfer")
    assert done(tmp_path / "run", "transfer")["teacher"]["commit"] == commit
    depends_on = json.loads((tmp_path / "run" / "transfer" / "stage.json").read_text())
    assert depends_on["teacher"]["files"] == {"hub": "owner/teacher", "commit": commit}
    assert done(tmp_path / "run", "transfer")["quality"]["kl"] > 0
