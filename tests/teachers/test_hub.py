"""Teachers from a hub: which commit is meant, and what is said where none is to be had."""

import pytest
import torch
from huggingface_hub import constants

from fake_hub import GATED, HIDDEN, FakeHub, as_the_hub
from transpoint.teachers import TeacherError, TeacherInfo, load_teacher, teacher_commit, teacher_info
from transpoint.teachers.hub import hub_commit
from transpoint.teachers.random import random_teacher


def files_of(folder, seed):
    """A tiny checkpoint that is all different from that of another seed: weights, tokenizer, generation settings."""
    model, tokenizer = random_teacher("random-llama", seed)
    model.generation_config.max_length = 100 + seed
    tokenizer.chat_template = f"template {seed}"
    for part in (model, tokenizer):
        part.save_pretrained(folder / str(seed))
    return {path.name: path.read_bytes() for path in (folder / str(seed)).iterdir()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return [files_of(tmp_path_factory.mktemp("checkpoints"), seed) for seed in (0, 1)]


@pytest.fixture
def hub(checkpoints, tmp_path):
    """A hub with a teacher, the second checkpoint of it in the branch `next`."""
    server = FakeHub()
    server.first = server.commit("owner/teacher", checkpoints[0])
    server.second = server.commit("owner/teacher", checkpoints[1], "next")
    with as_the_hub(server, tmp_path / "cache"):
        yield server
    server.stop()


def fails(*arguments):
    with pytest.raises(TeacherError) as caught:
        load_teacher(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def which(revision=None):
    """The seed of what is loaded, which all parts of it have to agree on."""
    model, tokenizer = load_teacher("owner/teacher", revision=revision)
    seed = model.generation_config.max_length - 100
    expected = random_teacher("random-llama", seed)[0]
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert tokenizer.chat_template == f"template {seed}"
    return seed


def test_a_revision_reaches_everything_that_is_loaded(hub):
    assert which() == which("main") == which(hub.first) == 0
    assert which("next") == which(hub.second) == 1
    assert teacher_commit("owner/teacher") == hub.first and teacher_commit("owner/teacher", "next") == hub.second
    found = teacher_info("owner/teacher", hub.second)
    assert found == TeacherInfo("owner/teacher", "mit", "owner/teacher", hub.second)
    assert f"/api/models/owner/teacher/revision/{hub.second}" in hub.authorizations


def test_a_process_goes_on_with_the_commit_that_it_began_with(hub, checkpoints):
    assert which() == 0
    hub.commit("owner/teacher", checkpoints[1])
    assert which() == 0
    hub_commit.cache_clear()  # as in the next one
    assert which() == 1


@pytest.mark.parametrize("gone", ["offline", "unreachable"])
def test_without_the_hub_its_cache_serves(gone, hub, monkeypatch):
    assert which() == 0
    hub_commit.cache_clear()
    if gone == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert which() == which(hub.first) == 0
    else:  # transformers asks many times before it takes what it has
        hub.stop()
    assert teacher_commit("owner/teacher") == hub.first
    told = fails("owner/other")
    assert told.startswith("teacher 'owner/other' cannot be looked up (")
    assert told.endswith(") and is not in the hub's cache here: check the network, or name a local copy")


def test_a_revision_that_is_none(hub):
    assert fails("owner/teacher", "float32", "cpu", False, "v9") == (
        "teacher 'owner/teacher' has no revision 'v9' on the hub: name a branch, a tag or a commit"
    )
    assert fails("random-llama", "float32", "cpu", False, "v9") == (
        "teacher 'random-llama' is not from the hub: leave out its revision, 'v9'"
    )


@pytest.mark.parametrize(
    "refuse, told",
    [
        (GATED, "is gated: ask for access at {url}/owner/teacher; then `hf auth login` or HF_TOKEN gives access"),
        (
            HIDDEN,
            "is not on the hub, or private: check the name; if it is private, `hf auth login` or HF_TOKEN gives access",
        ),
        ((403, {}), "is not open to us (403): `hf auth login` or HF_TOKEN gives access"),
    ],
    ids=["gated", "hidden", "forbidden"],
)
def test_a_hub_that_refuses(refuse, told, hub):
    hub.refuse = refuse
    assert fails("owner/teacher") == f"teacher 'owner/teacher' {told.format(url=hub.url)}"
