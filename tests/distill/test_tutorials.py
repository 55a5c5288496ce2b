"""The tutorials, as a reader types them, with a tiny teacher and a few steps.

In docs/tutorials a block titled with a file's name is that file, and one with another title needs more than a CPU: of
such a block what `accelerate` would start runs in one process, and our own commands are parsed. What a `text` block
without a title says is among what was printed.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil

import pytest
import zstandard
from accelerate.commands.launch import launch_command_parser

from merges import tokenizer_with
from run_files import CONFIGS, ROOT
from transpoint.distill.cli import _parser, main
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.slow
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
TEACHERS = {"smollm2-135m", "OWNER/NAME"}
FEW = [f"evaluate.{size}" for size in ("sequences=2", "recall_items=1", "cost_lengths=[16]", "max_new_tokens=8")]
SMALL = [*FEW, "evaluate.recall=[]", "data.length=64", "data.max_train_tokens=20000", "data.max_heldout_tokens=2000"]
SMALL += [f"{stage}.{size}=2" for stage in ("align", "distill") for size in ("batch_size", "micro_batch_size")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with our recipes, a teacher, and text of the reader's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("COLUMNS", "200")
    teacher, _ = random_teacher("random-llama", vocab_size=len(tokenizer_with()), max_position_embeddings=8192)
    for part in (teacher, tokenizer_with()):
        part.save_pretrained("teacher")
    sample = (tmp_path / "configs").symlink_to(CONFIGS) or CONFIGS / "sample"
    (tmp_path / "texts").mkdir()
    shutil.copy(sample / "train.jsonl.zst", "texts/own.jsonl.zst")
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    with zstandard.open(sample / "heldout.jsonl.zst", "rt", encoding="utf-8") as rows:
        (tmp_path / "heldout.jsonl").write_text(rows.read())
    return tmp_path


def follow(name, capfd, steps=()):
    """Does what a tutorial says; returns what was printed."""
    said = ""
    for kind, title, text in BLOCK.findall((TUTORIALS / f"{name}.md").read_text(encoding="utf-8")):
        lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()] if kind == "bash" else []
        if title.endswith(".yaml"):
            with open(title, "x") as file:
                file.write(text)
        elif kind == "python":
            exec(text, {})
        elif kind == "text" and not title:
            assert text in said
        for program, *words in lines:
            if program == "accelerate":
                launched = launch_command_parser().parse_args(words[1:])
                assert launched.module and launched.training_script == "transpoint.distill"
                assert os.path.isfile(launched.config_file)
                do("run", launched.training_script_args, steps)
            elif program == "transpoint" and title:
                _parser().parse_args(words)
            elif not title:
                assert program == "transpoint"
                do(words[0], words[1:], steps)
        said += capfd.readouterr().out
    return said


def do(command, words, steps):
    words = ["teacher" if word in TEACHERS else word for word in words]
    changes = {"run": [*SMALL, *steps, "teacher.source=teacher"], "eval": FEW}
    changes["plan"] = changes["run"]
    # A reader's own changes are the last.
    assert main([command, words[0], *changes.get(command, ()), *words[1:]]) == 0, (command, words)


def test_a_first_hybrid_on_a_laptop(here, capfd, unverified):
    said = follow("laptop", capfd, ["align.steps=2"])
    assert "question: What is the capital of France?" in said
    assert (here / "runs/first/report.html").is_file()


def test_own_data_on_several_gpus(here, capfd, unverified):
    follow("gpus", capfd, ["align.steps=2", "distill.steps=2"])
    assert (here / "runs/own/export/native/model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp")
def test_serve_it(here, capfd, run_tiny):
    settings = ["teacher.source=teacher", *FEW, "align.steps=2", "distill.steps=2"]
    run_tiny("runs/first", *settings)
    follow("serve", capfd)
    assert {path.name for path in (here / "served").iterdir()} == {"gguf", "native"}
