"""Uploading, against a hub of our own on the loopback: what arrives there, and that the token stays between the two."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from fake_hub import GATED, FakeHub, as_the_hub
from forked import in_one
from run_files import STAGES, TINY
from transpoint.distill.cli import main
from transpoint.distill.config import Recipe, load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.export import hub
from transpoint.distill.run.folder import StageFolder
from transpoint.distill.run.identity import identity

TOKEN = "hf_" + "MarkerThatMustNotLeak"
TEACHER = {"name": "owner/teacher", "license": "mit", "hub_id": "owner/teacher", "commit": "0" * 40}


@pytest.fixture
def start_hub():
    started = []

    def start(**options):
        started.append(FakeHub(**options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def run(tmp_path):
    """A run folder whose export is done."""
    root = tmp_path / "run"
    folder = root / "export" / "native"
    folder.mkdir(parents=True)
    (root / "recipe.yaml").write_text("run: {seed: 0}\n")
    recipe = Recipe().to_dict()
    recipe["data"]["train"] = [str(tmp_path / "secret" / "train.jsonl")]
    before = {}
    for stage in STAGES[: STAGES.index("export") + 1]:  # each names the one before it, as the pipeline writes them
        depends_on = {"after": before} if before else {}
        (root / stage).mkdir(exist_ok=True)
        (root / stage / "stage.json").write_text(json.dumps(depends_on))
        (root / stage / "done.json").write_text(json.dumps({"folder": "native", "recipe": recipe, "teacher": TEACHER}))
        before = {stage: identity(depends_on)}
    (folder / "config.json").write_text('{"model_type": "granitemoehybrid"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return root


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def push(server, tmp_path, *arguments):
    """`transpoint push` in a process of its own, as a person with HF_TOKEN set would run it: code, stdout, stderr."""

    def command():
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8") for number in (1, 2))  # not pytest's
        os.environ["HF_TOKEN"] = TOKEN
        with as_the_hub(server, tmp_path / "home"):
            code = main(["push", *map(str, arguments)])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

    code = in_one(command)
    return code, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text()


def leaks(printed, tmp_path):
    """Where the token is to be found: in files, or in what was printed."""
    found = [name for name, data in contents(tmp_path).items() if TOKEN.encode() in data or TOKEN in name]
    return found + [text for text in printed if TOKEN in text]


def test_push_uploads_the_export_and_keeps_the_token(run, start_hub, tmp_path):
    """With all the logging that can be asked for."""
    server, before = start_hub(), contents(run)
    code, out, err = push(server, tmp_path, run, "owner/name", "--private", "--debug")
    assert code == 0, err
    assert out == f"{server.url}/owner/name\n"
    files = server.files()
    recipe, page = yaml.safe_load(files.pop("recipe.yaml")), files.pop("report.html").decode()
    assert files == contents(run / "export" / "native")
    assert recipe["data"]["train"] == ["train.jsonl"] and recipe["teacher"]["revision"] == "0" * 40
    assert "train.jsonl" in page and "secret" not in page and str(tmp_path) not in page
    ((digest, large),) = server.objects.items()
    assert hashlib.sha256(large).hexdigest() == digest
    (created,) = server.created
    assert created["name"] == "name" and created["organization"] == "owner"
    assert created.get("private", created.get("visibility") == "private") is True  # older clients, newer ones
    for path in ("/api/repos/create", "/api/models/owner/name/commit/main"):
        assert server.authorizations[path] == f"Bearer {TOKEN}"  # it was given where it belongs
    assert leaks((out, err), tmp_path) == [] and contents(run) == before


# In this process


@pytest.mark.parametrize("refuse, told", [((403, {}), "403 Forbidden"), (None, "")])
def test_a_hub_that_refuses_or_is_not_there(refuse, told, run, start_hub, tmp_path, capfd, monkeypatch):
    server = start_hub(refuse=refuse)
    if refuse is None:
        server.stop()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with as_the_hub(server, tmp_path / "cache"):
        assert main(["push", str(run), "owner/name"]) == 1
    done = capfd.readouterr()
    assert done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith("transpoint: error: 'owner/name' could not be uploaded: ") and told in done.err
    assert done.err.endswith("; `hf auth login` or HF_TOKEN gives access\n")
    assert leaks(done, tmp_path) == [] and server.files() == {}
    assert refuse is None or f"Bearer {TOKEN}" in server.authorizations.values()


@pytest.fixture
def here(start_hub, tmp_path):
    """A hub that this process takes for the hub."""
    server = start_hub()
    with as_the_hub(server, tmp_path / "cache"):
        yield server


def test_a_run_that_was_pushed_is_loaded_by_its_name(tiny_run, here, tmp_path, capsys):
    before = contents(tiny_run)
    assert main(["push", str(tiny_run), "owner/name"]) == 0
    assert capsys.readouterr().out == f"{here.url}/owner/name\n" and contents(tiny_run) == before
    model, tokenizer = (kind.from_pretrained("owner/name") for kind in (AutoModelForCausalLM, AutoTokenizer))
    export = tiny_run / "export" / "native"
    expected = AutoModelForCausalLM.from_pretrained(export)
    assert type(model) is type(expected) and all(map(torch.equal, model.parameters(), expected.parameters()))
    assert tokenizer("any text").input_ids == AutoTokenizer.from_pretrained(export)("any text").input_ids
    files = here.files()
    own = contents(export)
    assert files.keys() - own.keys() == {"report.html", "recipe.yaml", "results.json"}
    assert {name for name in own if files[name] != own[name]} == {"README.md"}
    assert files["results.json"] == before["evaluate/results.json"]
    for name in ("report.html", "recipe.yaml", "README.md"):
        assert str(tiny_run).encode() not in files[name] and str(TINY.parent).encode() not in files[name]
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (again.align, again.student) == (load_recipe(TINY).align, load_recipe(TINY).student)


def test_the_card_of_a_run_says_what_was_measured(tiny_copy, here):
    results = json.loads((tiny_copy / "evaluate" / "done.json").read_text())
    task = {"task": "piqa", "metric": "acc", "value": 0.75, "samples": 4}
    results["measures"]["student"]["tasks"] = [task, {**task, "metric": "acc_norm", "value": float("nan")}]
    (tiny_copy / "evaluate" / "done.json").write_text(json.dumps(results))
    transfer = json.loads((tiny_copy / "transfer" / "done.json").read_text())
    (tiny_copy / "transfer" / "done.json").write_text(json.dumps(transfer | {"teacher": TEACHER}))
    hub.push(tiny_copy / "export" / "native", "owner/name", run=tiny_copy)
    card = ModelCard(here.files()["README.md"].decode())
    assert card.data.base_model == "owner/teacher" and card.data.model_name == "name"
    found = {(one.dataset_type, one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    text = "heldout.jsonl.zst"
    assert found == {
        ("held-out", text, "kl"): results["quality"]["kl"],
        ("held-out", text, "perplexity"): results["quality"]["perplexity"],
        ("piqa", "piqa", "acc"): 0.75,
    }
    assert card.text == ModelCard.load(tiny_copy / "export" / "native" / "README.md").text


def test_an_upload_that_was_interrupted_is_completed(run, here, capsys):
    folder = run / "export" / "native"
    for number in range(3):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    here.cut = 2
    assert main(["push", str(folder), "owner/name"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("transpoint: error: 'owner/name' could not be uploaded: ") and told.count("\n") == 1
    assert len(here.objects) == 2 and here.files() == {}  # nobody sees half a model
    here.cut = None
    assert main(["push", str(folder), "owner/name"]) == 0
    assert here.files() == contents(folder)
    assert len(here.sent) == len(set(here.sent)) == 4  # none twice


def test_a_repository_that_is_not_open_to_us(run, here, capsys):
    here.refuse = GATED
    assert main(["push", str(run), "owner/name"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("transpoint: error: 'owner/name' could not be uploaded: 403 ") and told.count("\n") == 1
    assert told.endswith("; `hf auth login` or HF_TOKEN gives access\n")


def test_without_what_draws_charts_the_report_is_left_out(run, here, monkeypatch, caplog):
    def write_report(*arguments):
        raise RunError("a report needs matplotlib: pip install 'transpoint[figure]'")

    monkeypatch.setattr(hub, "write_report", write_report)
    hub.push(run / "export" / "native", "owner/name", run=run)
    assert caplog.messages == ["report.html is left out: a report needs matplotlib: pip install 'transpoint[figure]'"]
    assert "recipe.yaml" in here.files() and "report.html" not in here.files()


# Without a hub


@pytest.fixture
def calls(monkeypatch):
    """What the client is asked to do."""
    calls = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, _name=name, **kwargs: calls.append((_name, args, kwargs)))
    return calls


@pytest.mark.parametrize("private", [True, False])
def test_what_the_client_is_asked(private, run, calls):
    folder = run / "export" / "native"
    assert hub.push(folder, "owner/name", private).endswith("/owner/name")
    (create, upload) = calls
    assert create == ("create_repo", ("owner/name",), {"private": private, "exist_ok": True})
    assert upload[0] == "upload_folder"
    assert upload[2]["repo_id"] == "owner/name" and upload[2]["folder_path"] == folder
    assert not any("token" in kwargs for _, _, kwargs in calls)


@pytest.mark.parametrize("name, what", [("config.json", "model"), ("README.md", "README.md")])
def test_a_folder_that_is_no_export(name, what, run, calls):
    folder = run / "export" / "native"
    (folder / name).unlink()
    with pytest.raises(RunError) as caught:
        hub.push(folder, "owner/name")
    assert str(caught.value) == f"'{folder}' is no exported folder: it has no {what}" and calls == []


@pytest.mark.parametrize("repo_id", ["name", "owner/", "/name", "a/b/c", ""])
def test_a_name_that_is_none(repo_id, run, calls):
    with pytest.raises(RunError) as caught:
        hub.push(run / "export" / "native", repo_id)
    assert str(caught.value) == f"'{repo_id}' is no repository; expected OWNER/NAME" and calls == []


def test_an_error_of_many_lines_is_one(run, monkeypatch):
    def create_repo(self, *args, **kwargs):
        raise ValueError("\n409 Client Error: conflict\n\nSee the documentation.\n")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(RunError) as caught:
        hub.push(run / "export" / "native", "owner/name")
    assert str(caught.value) == (
        "'owner/name' could not be uploaded: 409 Client Error: conflict; `hf auth login` or HF_TOKEN gives access"
    )


@pytest.mark.parametrize("done, found", [({"folder": "custom"}, "custom"), ({"folder": "native"}, "native")])
def test_which_folder_of_a_run_is_pushed(done, found, run, calls, capsys, monkeypatch):
    (run / "export" / "native").rename(run / "export" / found)
    StageFolder(run, "export").finish(done)
    folders = []
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, folder_path, **_: folders.append(contents(folder_path)))
    assert main(["push", str(run), "owner/name"]) == 0
    assert main(["push", str(run / "export" / found), "owner/name"]) == 0
    alone = contents(run / "export" / found)
    assert folders[1] == alone and alone.items() <= folders[0].items()
    assert folders[0].keys() - alone.keys() == {"recipe.yaml", "report.html"}
    assert capsys.readouterr().out.count("/owner/name\n") == 2
