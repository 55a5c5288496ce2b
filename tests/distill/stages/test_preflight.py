"""What a stage says before it trains, and what it refuses for want of space."""

import json
import shutil
from collections import namedtuple

import pytest
from rich.console import Console

from run_files import TINY
from transpoint.distill.config import Recipe, load_recipe
from transpoint.distill.data.sources import DataError
from transpoint.distill.errors import RunError
from transpoint.distill.stages.preflight import (
    check_disk,
    check_prompts,
    check_vocabulary,
    checkpoint_bytes,
    what_will_run,
)
from transpoint.distill.stages.session import Session
from transpoint.distill.train.groups import distill_groups
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher


@pytest.fixture(scope="module")
def models():
    teacher, _ = random_teacher("random-llama")
    return teacher, build_student(teacher, StudentConfig(keep_attention="every:2"))


def said(models, recipe, processes=1, sharded=(), device=None, precision="fp32"):
    teacher, student = models
    groups = distill_groups(student, recipe.distill)
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))
    what = what_will_run("distill", groups, student, teacher, recipe, precision, processes, sharded, device)
    console.print(what)
    return console.export_text()


def test_parameters_tokens_and_rates(models):
    recipe = Recipe()
    recipe.data.length, recipe.distill.steps, recipe.distill.batch_size = 128, 30, 8
    recipe.distill.micro_batch_size, recipe.distill.teacher_lr = 2, 0.0
    text = said(models, recipe, processes=2)
    _, student = models
    trained = sum(
        p.numel() for name, p in student.named_parameters() if ".0.self_attn" in name or ".2.self_attn" in name
    )
    total = sum(p.numel() for p in student.parameters())
    for figure in (f"{trained:,}", f"{total - trained:,}", "0.0005", "30 steps of 8 x 128 tokens: 30,720"):
        assert figure in text
    assert "(2 processes, 2 x 2 sequences a step in each)" in text


def memory_of(models, *args, **more):
    """Of a process, in MB, as it is said."""
    recipe = Recipe()
    recipe.distill.teacher_lr = 1e-4
    (line,) = [line for line in said(models, recipe, *args, **more).splitlines() if line.startswith("memory")]
    return float(line.split(": ")[1].split(" MB")[0])


def test_a_rounded_teacher_takes_half_the_memory_and_on_a_cpu_its_whole_one_beside_it(models):
    whole, on_a_gpu, on_a_cpu = (
        memory_of(models, precision=precision, device=device)
        for precision, device in (("fp32", None), ("bf16", "an unknown GPU"), ("bf16", None))
    )
    half = 2 * sum(p.numel() for p in models[0].parameters()) / 1e6
    assert on_a_gpu == pytest.approx(whole - half, abs=0.11) and on_a_cpu == pytest.approx(whole + half, abs=0.11)


def test_what_is_sharded_takes_less_memory_in_each_process(models):
    def memory(sharded):
        return memory_of(models, 4, sharded)

    whole = memory(())
    assert whole > memory(("optimizer",)) > memory(("optimizer", "gradients"))
    teacher, student = models
    count = sum(p.numel() for p in student.parameters())
    assert whole == pytest.approx((16 * count + 4 * sum(p.numel() for p in teacher.parameters())) / 1e6, abs=0.06)
    assert memory(("optimizer", "gradients", "parameters")) == pytest.approx(
        (4 * count + 4 * sum(p.numel() for p in teacher.parameters())) / 1e6, abs=0.06
    )


def test_a_time_is_told_for_gpus_whose_peak_is_known(models):
    assert "time: about" in said(models, Recipe(), device="NVIDIA H200")
    assert "time" not in said(models, Recipe(), device="GPU of the year")


def test_a_disk_too_small_is_told_before_training(models, tmp_path, monkeypatch):
    _, student = models
    config = Recipe().distill
    groups = distill_groups(student, config)
    needed = 2 * checkpoint_bytes(groups) + 4 * sum(p.numel() for p in student.parameters())  # 100 steps: one, and one
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed))
    check_disk(tmp_path, groups, student, config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, needed - 1))
    with pytest.raises(RunError) as caught:
        check_disk(tmp_path, groups, student, config)
    told = str(caught.value)
    assert told.startswith("2 checkpoints and the student need ") and f"are free at {tmp_path}: free some space" in told


# Tokens beyond the model's embeddings


@pytest.mark.parametrize(
    "added, refused",
    [
        ({"pad_token": "<pad>"}, None),
        ({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]}, None),
        ({"eos_token": "<end>"}, "<end>"),
        ({"eos_token": "<end>", "pad_token": "<end>"}, "<end>"),
        ({"bos_token": "<begin>", "pad_token": "<pad>"}, "<begin>"),
        (["<word>"], "<word>"),
    ],
)
def test_special_tokens_that_no_text_needs_may_lack_an_embedding(models, added, refused):
    (teacher, _), (_, tokenizer) = models, random_teacher("random-llama")
    rows = teacher.config.vocab_size
    (tokenizer.add_special_tokens if isinstance(added, dict) else tokenizer.add_tokens)(added)
    assert len(tokenizer) > rows
    if refused is None:
        return check_vocabulary(tokenizer, teacher, "teacher")
    with pytest.raises(RunError) as caught:
        check_vocabulary(tokenizer, teacher, "teacher")
    assert str(caught.value) == (
        f"the tokenizer has a token {refused!r} of number {rows}, the teacher's embeddings {rows} rows: they do not "
        "belong together; use the tokenizer that the teacher was trained with, or resize its embeddings"
    )


@pytest.fixture
def padded(tmp_path):
    """Folders of a teacher whose tokenizer was given a token for padding and which was not, and of one which was."""
    teacher, tokenizer = random_teacher("random-llama")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folders = tmp_path / "teacher", tmp_path / "resized"
    for folder in folders:
        teacher.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        teacher.resize_token_embeddings(len(tokenizer))
    return folders


@pytest.mark.slow
def test_a_teacher_that_lacks_the_padding_token_is_trained_from(padded, run_tiny, tmp_path):
    few = [f"{stage}.steps=2" for stage in ("align", "distill")]
    output = run_tiny(tmp_path / "run", f"teacher.source={padded[0]}", *few, until_stage="distill")
    assert "distill: held-out KL" in output


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_text_that_holds_it_is_refused(padded, tmp_path, streaming):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"words {i} " * 20 + "<pad>" * (i == 7)}) + "\n" for i in range(9)))

    def read(teacher):
        options = [f"data.train=[{text}]", f"data.streaming={streaming}", f"data.cache={tmp_path / 'cache'}"]
        options += ["data.max_train_tokens=null"]
        session = Session(load_recipe(TINY, [f"run.dir={tmp_path / 'run'}", f"teacher.source={teacher}", *options]))
        return session, session.train_data.spread(99)

    session, items = read(padded[1])
    rows = session.teacher.config.vocab_size - 1
    assert any(rows in item["input_ids"] for item in items)
    with pytest.raises(DataError) as caught:  # though what the other has tokenised is in the cache
        read(padded[0])
    assert str(caught.value) == (
        f"{text}: the text holds the token '<pad>' of number {rows}, the model's embeddings {rows} rows: take it out "
        "of the text, or of the chat template that puts it there, or resize the model's embeddings"
    )


@pytest.mark.parametrize(
    "prompts, template, reason",
    [
        (["x" * 600], None, "and with evaluate.max_new_tokens more than the teacher's 512 positions: shorten it"),
        (["plain"], "{{ raise_exception('only with a system message') }}", "only with a system message"),
        (["plain"], "{{ messages[0].nothing.at_all }}", "evaluate.prompts: the tokenizer fails on 'plain': "),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_training(prompts, template, reason):
    teacher, tokenizer = random_teacher("random-llama")
    tokenizer.chat_template = template
    recipe = Recipe()
    if template is None:
        check_prompts(tokenizer, teacher, recipe)
    recipe.evaluate.prompts = prompts
    with pytest.raises(RunError) as caught:
        check_prompts(tokenizer, teacher, recipe)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
