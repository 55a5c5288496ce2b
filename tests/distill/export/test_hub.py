"""Uploading, against a hub of our own on the loopback: what arrives there, and that the token stays between the two."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from fake_hub import FakeHub
from run_files import STAGES
from transpoint.distill.errors import RunError
from transpoint.distill.export import hub
from transpoint.distill.run.folder import StageFolder
from transpoint.distill.run.identity import identity

TOKEN = "hf_" + "MarkerThatMustNotLeak"


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
    before = {}
    for stage in STAGES[: STAGES.index("export") + 1]:  # each names the one before it, as the pipeline writes them
        depends_on = {"after": before} if before else {}
        (root / stage).mkdir(exist_ok=True)
        (root / stage / "stage.json").write_text(json.dumps(depends_on))
        (root / stage / "done.json").write_text('{"folder": "native"}')
        before = {stage: identity(depends_on)}
    (folder / "config.json").write_text('{"model_type": "granitemoehybrid"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return root


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def push(server_url, tmp_path, *arguments):
    """`transpoint push` in a process of its own, as a person with HF_TOKEN set would run it."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server_url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "transpoint.distill", "push", *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def leaks(done, tmp_path):
    """Where the token is to be found."""
    found = [name for name, data in contents(tmp_path).items() if TOKEN.encode() in data or TOKEN in name]
    return found + [text for text in (done.stdout, done.stderr) if TOKEN in text]


@pytest.mark.slow
def test_push_uploads_the_export_and_keeps_the_token(run, start_hub, tmp_path):
    """With all the logging that can be asked for."""
    server, before = start_hub(), contents(run)
    done = push(server.url, tmp_path, run, "owner/name", "--private", "--debug")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{server.url}/owner/name\n"
    assert server.files() == contents(run / "export" / "native")
    ((digest, large),) = server.objects.items()
    assert hashlib.sha256(large).hexdigest() == digest
    (created,) = server.created
    assert created["name"] == "name" and created["organization"] == "owner"
    assert created.get("private", created.get("visibility") == "private") is True  # older clients, newer ones
    for path in ("/api/repos/create", "/api/models/owner/name/commit/main"):
        assert server.authorizations[path] == f"Bearer {TOKEN}"  # it was given where it belongs
    assert leaks(done, tmp_path) == [] and contents(run) == before


@pytest.mark.slow
@pytest.mark.parametrize("refuse, told", [((403, {}), "403 Forbidden"), (None, "")])
def test_a_hub_that_refuses_or_is_not_there(refuse, told, run, start_hub, tmp_path):
    server = start_hub(refuse=refuse)
    if refuse is None:
        server.stop()
    done = push(server.url, tmp_path, run, "owner/name")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("transpoint: error: 'owner/name' could not be uploaded: ") and told in done.stderr
    assert done.stderr.endswith("; `hf auth login` or HF_TOKEN gives access\n")
    assert leaks(done, tmp_path) == [] and server.files() == {}


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
def test_which_folder_of_a_run_is_pushed(done, found, run, calls, capsys):
    from transpoint.distill.cli import main

    (run / "export" / "native").rename(run / "export" / found)
    StageFolder(run, "export").finish(done)
    assert main(["push", str(run), "owner/name"]) == 0
    assert main(["push", str(run / "export" / found), "owner/name"]) == 0
    assert [call[2]["folder_path"] for call in calls if call[0] == "upload_folder"] == [run / "export" / found] * 2
    assert capsys.readouterr().out.count("/owner/name\n") == 2
