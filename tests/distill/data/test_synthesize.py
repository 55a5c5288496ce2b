"""Text sampled from the teacher: what it is, that it is the same again, and that nothing sampled is lost."""

import hashlib
import io
import json
import os
import shutil
import signal

import pytest
import torch
import zstandard
from rich.console import Console

from forked import in_one, run_all
from run_files import TINY
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.data import synthesize as module
from transpoint.distill.data.corpus import tokenize_corpus
from transpoint.distill.data.sources import DataError
from transpoint.distill.data.synthesize import synthesize
from transpoint.distill.errors import RunError
from transpoint.distill.stages.session import Session
from transpoint.teachers.random import byte_tokenizer, random_teacher

SMALL = ["synthesize.samples=10", "synthesize.batch_size=4", "synthesize.max_new_tokens=12", "run.precision=fp32"]


def open_session(folder, *overrides):
    recipe = load_recipe(TINY, [*SMALL, f"run.dir={folder.parent / 'run'}", f"synthesize.out={folder}", *overrides])
    return Session(recipe, Console(file=io.StringIO()))


def sample(folder, *overrides):
    """The rows in the folder, and the record, after sampling."""
    session = open_session(folder, *overrides)
    record = synthesize(session.recipe, session.teacher, session.tokenizer, session.accelerator, session.console)
    return rows(folder), record


def rows(folder):
    with zstandard.open(folder / "data.jsonl.zst", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"synthesize.prompts=[{path}]"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# What is sampled


def test_without_prompts_samples_start_from_the_beginning_of_text(folder):
    found, record = sample(folder)
    assert len(found) == record["rows"] == record["sampled"] == 10
    assert {(row["prompt"], row["source"]) for row in found} == {("", "beginning of text")}
    assert len({row["text"] for row in found}) == 10  # no two of a batch, or of two batches, are the same
    assert record["sha256"] == hashlib.sha256((folder / "data.jsonl.zst").read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == ["data.jsonl.zst", "synthesis.json"]


def test_the_text_can_be_trained_on(folder, tokenizer):
    found, _ = sample(folder)
    corpus = tokenize_corpus([str(folder)], tokenizer)
    assert corpus.documents == 10 and not corpus.skipped
    chats, _ = sample(folder.parent / "chats", "synthesize.chat=true")
    corpus = tokenize_corpus([str(folder.parent / "chats" / "data.jsonl.zst")], tokenizer)
    assert corpus.documents == len(chats) and not corpus.skipped


def greedy(prompt_ids, new):
    """The most likely continuation, computed anew for each token."""
    teacher, tokenizer = random_teacher("random-llama")
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(teacher(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                return ids[len(prompt_ids) : -1]
    return ids[len(prompt_ids) :]


def test_texts_are_continued_as_the_teacher_alone_would(folder, tokenizer):
    """Batched with prompts of other lengths, padded and cached, greedy decoding is what it is one by one."""
    texts = ["a", "some words", "a rather longer beginning of a text that is cut"]
    prompts = jsonl(folder.parent / "p.jsonl", *({"text": text} for text in texts))
    found, record = sample(
        folder, prompts, "synthesize.temperature=0", "synthesize.samples=4", "synthesize.max_prompt_tokens=20"
    )
    for row, text in zip(found, [*texts, texts[0]], strict=True):
        ids = tokenizer(text[:20])["input_ids"]
        assert row["text"] == tokenizer.decode(ids + greedy(ids, 12), skip_special_tokens=True)
        assert row["prompt"] == text[:20] and row["text"].startswith(text[:20])
    assert [row["source"] for row in found] == ["p.jsonl line 1", "p.jsonl line 2", "p.jsonl line 3", "p.jsonl line 1"]


def test_chats_are_answered_after_their_last_question(folder, tokenizer):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    prompts = jsonl(
        folder.parent / "p.jsonl",
        {"messages": [*chat, {"role": "assistant", "content": "not this"}]},
        {"messages": [{"role": "assistant", "content": "no question"}]},
        {"other": 1},
        {"messages": [{"role": "user", "content": "long " * 100}]},
        {"text": "What?"},
    )
    options = ["synthesize.temperature=0", "synthesize.samples=2", "synthesize.chat=true"]
    found, record = sample(folder, prompts, *options)
    assert [row["messages"][:-1] for row in found] == [chat, [{"role": "user", "content": "What?"}]]
    assert [row["prompt"] for row in found] == ["Why?", "What?"]
    for row in found:
        text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        expected = tokenizer.decode(greedy(tokenizer(text)["input_ids"], 12), skip_special_tokens=True).strip()
        assert row["messages"][-1] == {"role": "assistant", "content": expected}
    assert sum(record["skipped_prompts"].values()) == 3
    assert record["skipped_prompts"]["longer than synthesize.max_prompt_tokens"] == 1


def test_the_teacher_writes_questions_and_answers(folder, tokenizer):
    found, record = sample(folder, "synthesize.chat=true", "synthesize.temperature=0", "synthesize.samples=1")
    question = tokenizer.decode(greedy(tokenizer("<|im_start|>user\n")["input_ids"], 12), skip_special_tokens=True)
    assert found[0]["messages"][0] == {"role": "user", "content": question.strip()}
    assert found[0]["messages"][1]["role"] == "assistant" and found[0]["prompt"] == question.strip()


@pytest.mark.parametrize("override", ["synthesize.top_k=1", "synthesize.top_p=1.0e-6"])
def test_sampling_settings_hold(folder, override):
    """Of the most likely token alone, every sample is greedy."""
    found, _ = sample(folder, override)
    want, _ = sample(folder.parent / "greedy", "synthesize.temperature=0")
    assert found == want and len({row["text"] for row in found}) == 1


def test_settings_of_generation_that_came_with_the_teacher_do_not(folder):
    session = open_session(folder)
    session.teacher.generation_config.update(repetition_penalty=5.0, min_new_tokens=3, top_k=1, do_sample=False)
    own = session.teacher.generation_config.to_dict()
    synthesize(session.recipe, session.teacher, session.tokenizer, session.accelerator, session.console)
    assert rows(folder) == sample(folder.parent / "plain")[0]
    assert session.teacher.generation_config.to_dict() == own


def test_a_padding_token_that_the_teacher_lacks(folder):
    """It is not what prompts of other lengths are padded with, and a prompt may not hold it."""
    teacher, tokenizer = random_teacher("random-llama")
    texts = [{"text": "a"}, {"text": "some words"}, {"text": "a rather longer beginning"}]

    def sampled(name, prompts):
        path = folder.parent / name
        for part in (teacher, tokenizer):
            part.save_pretrained(f"{path}-teacher")
        found, _ = sample(path, jsonl(path.with_suffix(".jsonl"), *prompts), f"teacher.source={path}-teacher")
        return [row["text"] for row in found]

    found = sampled("before", texts)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert sampled("after", texts) == found
    with pytest.raises(DataError, match="^p.jsonl line 2: the text holds the token '<pad>' of number 259"):
        sampled("p", [{"text": "a"}, {"text": "b <pad> c"}])


# The same again


def test_seed_and_settings_give_the_text(folder):
    found, _ = sample(folder)
    torch.rand(5)
    state = torch.get_rng_state()
    assert sample(folder.parent / "again")[0] == found
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(folder.parent / "other", "run.seed=1")[0] != found
    assert (folder / "data.jsonl.zst").read_bytes() == (folder.parent / "again" / "data.jsonl.zst").read_bytes()


def test_what_the_text_depends_on_is_recorded(folder):
    prompts = jsonl(folder.parent / "p.jsonl", {"text": "once"})
    _, record = sample(folder, prompts, "synthesize.temperature=0.7")
    assert record == json.loads((folder / "synthesis.json").read_text())
    on = record["depends_on"]
    assert on["teacher"] == {"source": "random-llama", "files": "random-llama", "dtype": "float32"} and on["seed"] == 0
    assert on["settings"]["temperature"] == 0.7 and on["settings"]["max_new_tokens"] == 12
    assert on["prompts"] == [[[hashlib.sha256((folder.parent / "p.jsonl").read_bytes()).hexdigest()]]]
    assert record["versions"]["torch"] == torch.__version__
    assert record["tokens"] <= 120 and record["cut"] + record["empty"] <= 10


def test_sampled_before_is_reused(folder, monkeypatch):
    found, record = sample(folder)
    monkeypatch.setattr(module, "_Sampler", None)
    assert sample(folder) == (found, record)


@pytest.mark.slow
def test_two_processes_sample_and_cache_what_one_does(folder):
    """Byte for byte."""
    caching = [f"cache_teacher.{key}" for key in ("shard_mb=1", "k=259", "dtype=float32", "hidden=true")]
    jobs = []
    for processes, engine in ((1, "single"), (2, "ddp")):
        own = [f"synthesize.out={folder}{processes}", f"distill.teacher_cache={folder}-cache{processes}"]
        for command in ("synthesize", "cache-teacher"):
            arguments = [command, TINY, *SMALL, *caching, f"run.dir={folder.parent / 'run'}", *own]
            log = folder.parent / f"{command}{processes}.log"
            jobs.append({"engine": engine, "arguments": arguments, "log": log, "processes": processes})
    outputs = run_all(jobs)
    for processes, output in zip((1, 2), outputs[::2], strict=True):
        assert f"synthesize: step {4 * processes}/10 " in output
    for name in ("out", "out-cache"):
        assert contents(folder.parent / f"{name}1") == contents(folder.parent / f"{name}2")
    assert len(contents(folder.parent / "out-cache2")) == 11


# Interruptions and damage


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "where, call", [("rows", 1), ("rows", 2), ("write_json", 2), ("write_json", 3), ("_finish", 1), ("last", 0)]
)
def test_an_interrupted_call_goes_on(folder, monkeypatch, where, call):
    """Wherever it stops, no batch that was written is sampled again, and the files are those of one go."""
    sample(folder.parent / "whole")
    sampled, calls, original_rows = [], [], module._Sampler.rows

    def sample_rows(self, batch, prompts):
        if where == "rows" and len(sampled) == call and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        sampled.append(batch)
        return original_rows(self, batch, prompts)

    def stop(original):
        def run(*args):
            calls.append(1)
            if len(calls) == call or (where == "last" and args[1]["sha256"]):
                raise KeyboardInterrupt
            return original(*args)

        return run

    monkeypatch.setattr(module._Sampler, "rows", sample_rows)
    name = "write_json" if where == "last" else where
    if name != "rows":
        original = getattr(module, name)
        monkeypatch.setattr(module, name, stop(original))
    with pytest.raises(KeyboardInterrupt):
        sample(folder)
    if name != "rows":
        monkeypatch.setattr(module, name, original)
    sample(folder)
    assert contents(folder) == contents(folder.parent / "whole")
    twice = [call - 2] if where == "write_json" else []  # the batch that was not in the record yet
    assert sorted(sampled) == sorted([0, 1, 2, *twice])


def test_a_kill_loses_one_batch_at_most(folder):
    sample(folder.parent / "whole")

    def run():
        original = module.write_json

        def kill(path, record):
            if record["batches"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)  # the rows are in the file, the record does not say so yet
            return original(path, record)

        module.write_json = kill
        main(["synthesize", str(TINY), *SMALL, f"run.dir={folder.parent / 'run'}", f"synthesize.out={folder}"])

    assert in_one(run) == -signal.SIGKILL
    assert json.loads((folder / "synthesis.json").read_text())["batches"] == 1
    sample(folder)
    assert contents(folder) == contents(folder.parent / "whole")


def test_a_full_disk_is_said_and_what_was_sampled_stays(folder, monkeypatch):
    original, calls = module.write_json, []

    def full(path, record):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(path, record)

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(RunError, match="could not be written .*what was sampled before is intact: free some space"):
        sample(folder)
    monkeypatch.setattr(module, "write_json", original)
    sample(folder)
    sample(folder.parent / "whole")
    assert contents(folder) == contents(folder.parent / "whole")


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["run.seed=1"], r"holds text of another run.seed \(0, not 1\): set synthesize.out to another"),
        (["synthesize.temperature=0.5"], r"another synthesize.temperature \(1.0, not 0.5\)"),
        (["teacher.source=random-qwen2"], "another teacher"),
    ],
)
def test_text_of_other_settings_is_not_touched(folder, overrides, told):
    sample(folder)
    before = contents(folder)
    with pytest.raises(RunError, match=told):
        sample(folder, *overrides)
    assert contents(folder) == before


def test_damage_is_named(folder):
    sample(folder)
    (folder / "data.jsonl.zst").write_bytes(b"short")
    with pytest.raises(RunError, match="data.jsonl.zst is missing or damaged: remove"):
        sample(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(RunError, match="holds something else than sampled text"):
        sample(folder)


def test_rows_that_went_missing_are_named(folder, monkeypatch):
    monkeypatch.setattr(module, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(folder)
    os.truncate(folder / ".data.jsonl.zst", 10)
    with pytest.raises(RunError, match=".data.jsonl.zst is shorter than was written: remove"):
        sample(folder)


# What cannot be sampled


@pytest.mark.parametrize(
    "overrides, error, told",
    [
        (["synthesize.max_new_tokens=600"], RunError, "600 new ones exceed the teacher's 512 positions: lower"),
        (["synthesize.chat=true", "synthesize.max_new_tokens=300"], RunError, "600 new ones exceed"),
        (["synthesize.prompts=[nowhere.jsonl]"], DataError, "no such file or folder: nowhere.jsonl"),
    ],
)
def test_what_cannot_be_sampled_is_said_first(folder, overrides, error, told):
    with pytest.raises(error, match=told):
        sample(folder, *overrides)


def test_prompts_that_cannot_be_used_are_counted(folder):
    prompts = jsonl(folder.parent / "p.jsonl", {"other": 1}, {"text": " "}, [1])
    with pytest.raises(
        DataError, match="no usable prompt in .*p.jsonl: 2 neither text nor a chat .*, 1 not a JSON object"
    ):
        sample(folder, prompts)


def test_a_chat_needs_a_template(folder):
    session = open_session(folder, "synthesize.chat=true")
    session.tokenizer.chat_template = None
    with pytest.raises(DataError, match="synthesize.chat is true but the tokenizer has no chat template"):
        synthesize(session.recipe, session.teacher, session.tokenizer, session.accelerator, session.console)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"COLUMNS": "300"})
    assert main(["synthesize", str(TINY), *SMALL, f"run.dir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert out.startswith(f"{tmp_path / 'run' / 'synthetic' / 'data.jsonl.zst'}: 10 rows, ")
    assert len(rows(tmp_path / "run" / "synthetic")) == 10


def test_prompts_beside_the_recipe_are_found(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "r.yaml").write_text("synthesize: {prompts: [p.jsonl]}")
    assert load_recipe(tmp_path / "r.yaml").synthesize.prompts == [str((tmp_path / "p.jsonl").resolve())]
