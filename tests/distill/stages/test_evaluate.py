"""What evaluate measures besides: the same of teacher and student, said in record, card and page."""

import dataclasses
import io

import pytest
from rich.console import Console

from run_files import ROOT, done
from transpoint.distill import models
from transpoint.distill.data.corpus import tokenize_corpus
from transpoint.distill.data.packed import PackedDataset
from transpoint.distill.data.sources import DataError
from transpoint.distill.errors import RunError
from transpoint.distill.export.formats import FORMATS
from transpoint.distill.export.native import NATIVE
from transpoint.distill.measure.held_out import HeldOut
from transpoint.distill.models import load_model, load_tokenizer
from transpoint.distill.report.summary import summary
from transpoint.distill.run.files import read_json, write_json
from transpoint.teachers.random import random_teacher


@pytest.fixture
def sources(tmp_path):
    """Two held-out texts of different kinds, with one name."""
    found = [tmp_path / "one" / "text.txt", tmp_path / "other" / "text.txt"]
    for path, words in zip(found, ("one text of words. ", "0 1 2 3 4 5; "), strict=True):
        path.parent.mkdir()
        path.write_text(words * 60)
    return [str(path) for path in found]


def test_by_source_and_by_length(tiny_copy, run_tiny, sources):
    more = [f"data.heldout=[{','.join(sources)}]", "evaluate.lengths=[128]", "evaluate.recall=[]"]
    run_tiny(tiny_copy, *more)
    record = done(tiny_copy, "evaluate")
    measures = record["measures"]
    keys = [("text.txt", 64), ("other/text.txt", 64), ("", 128)]
    assert [(one["source"], one["length"]) for one in measures["student"]["texts"]] == keys
    assert all(one["quality"]["kl"] == pytest.approx(0, abs=1e-5) for one in measures["teacher"]["texts"])
    student, (teacher, _) = load_model(tiny_copy / "export" / "native"), random_teacher("random-llama")
    tokenizer = load_tokenizer(tiny_copy / "export" / "native")
    for one, (paths, length) in zip(
        measures["student"]["texts"], [(sources[:1], 64), (sources[1:], 64), (sources, 128)], strict=True
    ):
        corpus = tokenize_corpus(paths, tokenizer, max_tokens=2000)
        wanted = HeldOut(PackedDataset(corpus, length), 8 * 64 // length, tokenizer, teacher).measure(student)
        assert one["quality"]["kl"] == pytest.approx(wanted.kl, rel=1e-4)
        assert one["quality"]["tokens"] == wanted.tokens
    card = (tiny_copy / "export" / "native" / "README.md").read_text()
    kl = measures["student"]["texts"][1]["quality"]["kl"]
    assert f"| KL from teacher (other/text.txt, 64 tokens) | 0.0000 | {kl:.4f} |" in card
    shown = io.StringIO()
    for part in summary(tiny_copy):
        Console(file=shown, width=120).print(part)
    (row,) = [line for line in shown.getvalue().splitlines() if "KL from teacher (other/text.txt, 64 tokens)" in line]
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["0.0000", f"{kl:.4f}"]


def test_the_student_is_measured_where_torch_cannot_run_the_export(tiny_copy, run_tiny, monkeypatch):
    unread = dataclasses.replace(NATIVE, load=lambda folder: pytest.fail("it was loaded"), loads=False)
    monkeypatch.setitem(FORMATS, "native", unread)
    loaded = []
    monkeypatch.setattr(models, "load_model", lambda path: loaded.append(path) or load_model(path))
    run_tiny(tiny_copy, "evaluate.recall=[]", "evaluate.max_new_tokens=4")
    assert loaded == [tiny_copy / "distill" / "student"]  # once: the card needs none of its weights
    assert done(tiny_copy, "evaluate")["quality"] == done(tiny_copy, "distill")["quality"]


def test_less_text_than_a_sequence_is_left_out_and_said(tiny_copy, run_tiny, tmp_path, sources):
    (tmp_path / "small.txt").write_text("few words")
    more = ["evaluate.recall=[]", "evaluate.cost_lengths=[32,500,500,64]", "evaluate.lengths=[4096,1024,128]"]
    said = run_tiny(tiny_copy, *more, f"data.heldout=[{sources[0]},{tmp_path / 'small.txt'}]")
    assert "evaluate: small.txt has 10 tokens, less than a sequence of 64: left out" in said
    assert "evaluate: the held-out text has 1,151 tokens, less than a sequence of 4,096: left out" in said
    assert "evaluate: quality at 1024 tokens is left out: the model takes 512" in said
    assert "evaluate: cost at 500 tokens is left out: with tokens to follow, the model takes 496" in said
    student = done(tiny_copy, "evaluate")["measures"]["student"]
    assert [(one["source"], one["length"]) for one in student["texts"]] == [("text.txt", 64), ("", 128)]
    assert [one["length"] for one in student["costs"]] == [32, 64]


def test_tasks_that_are_not_there_are_refused_before_anything_runs(tmp_path, run_tiny):
    with pytest.raises(RunError, match="there is no folder of tasks"):
        run_tiny(tmp_path / "run", "evaluate.tasks=[mine]", f"evaluate.tasks_folder={tmp_path / 'tasks'}")
    assert not (tmp_path / "run" / "transfer" / "done.json").exists()


def test_texts_too_short_to_ask_in_are_refused_before_anything_runs(tmp_path, run_tiny):
    with pytest.raises(RunError, match="no text of 20 tokens with a number in it can be made: give a larger length"):
        run_tiny(tmp_path / "run", "evaluate.recall_lengths=[20]")
    assert not (tmp_path / "run" / "transfer" / "done.json").exists()


def test_recall_of_both_models_and_a_map_of_it(tiny_run):
    measures = done(tiny_run, "evaluate")["measures"]
    for model in ("teacher", "student"):
        assert [one["task"] for one in measures[model]["recall"]] == ["passkey", "multikey", "pairs"]
        for one in measures[model]["recall"][:2]:
            assert one["depths"] == [0.25, 0.75] and len(one["right"]) == one["answers"] == 2


def test_texts_longer_than_the_teacher_takes_are_left_out(tiny_copy, run_tiny):
    said = run_tiny(tiny_copy, "evaluate.recall_lengths=[192,1500]", "evaluate.recall=[passkey]")
    longest = random_teacher("random-llama")[0].config.max_position_embeddings
    assert f"recall at 1500 tokens is left out: the model takes {longest:,}" in said
    assert [one["length"] for one in done(tiny_copy, "evaluate")["measures"]["student"]["recall"]] == [192]


@pytest.mark.slow
def test_questions_are_asked_and_costs_measured_of_both(tiny_copy, run_tiny):
    source = ROOT / "configs" / "sample" / "questions.jsonl"
    run_tiny(tiny_copy, f"evaluate.questions={source}", "evaluate.cost_lengths=[32,64]", "evaluate.recall=[]")
    measures = done(tiny_copy, "evaluate")["measures"]
    rows = len(source.read_text().splitlines()) - 3
    for model in ("teacher", "student"):
        assert len(measures[model]["questions"]) == rows
        assert [one["length"] for one in measures[model]["costs"]] == [32, 64]
    teacher, student = ([one["cache_bytes"] for one in measures[model]["costs"]] for model in ("teacher", "student"))
    assert teacher[1] == 2 * teacher[0] and student[1] - student[0] == (teacher[1] - teacher[0]) / 2  # half the layers
    card = (tiny_copy / "export" / "native" / "README.md").read_text()
    assert f"| questions answered exactly (of {rows}) | 0 | 0 |" in card
    assert f"| cache (64 tokens) | {teacher[1] / 2**20:.2f} MiB | {student[1] / 2**20:.2f} MiB |" in card


def test_questions_that_are_none_are_refused_before_anything_runs(tmp_path, run_tiny):
    (tmp_path / "asked.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n')
    with pytest.raises(DataError, match="asked.jsonl line 1: no answers: expected a list of texts as 'answers'"):
        run_tiny(tmp_path / "run", f"evaluate.questions={tmp_path / 'asked.jsonl'}")
    assert not (tmp_path / "run" / "transfer" / "done.json").exists()


@pytest.mark.slow
def test_other_questions_are_asked_again(tiny_copy, run_tiny, tmp_path):
    asked = tmp_path / "asked.jsonl"
    rows = [f'{{"question": "What is {n} plus 1?", "answers": ["{n + 1}"]}}' for n in range(5)]
    asked.write_text("\n".join(rows[:4]))
    more = (f"evaluate.questions={asked}", "evaluate.recall=[]")
    run_tiny(tiny_copy, *more)
    assert "evaluate: done before, reused" in run_tiny(tiny_copy, *more)
    asked.write_text("\n".join(rows))
    assert "evaluate: changed: evaluate.questions" in run_tiny(tiny_copy, *more)
    assert len(done(tiny_copy, "evaluate")["measures"]["student"]["questions"]) == 2


@pytest.mark.slow
def test_the_teacher_is_measured_once_for_runs_that_reuse_each_other(tiny_copy, run_tiny, tmp_path):
    kept = tiny_copy / "teacher_measures.json"
    found = read_json(kept)
    found["measures"]["recall"][0]["logprob"] = -123.0  # told apart from what is measured
    write_json(kept, found)
    other = tmp_path / "other"
    # Whatever the student was trained on.
    run_tiny(other, f"run.reuse=[{tiny_copy}]", "distill.lr=2e-5", "data.max_train_tokens=15000")
    measures = done(other, "evaluate")["measures"]
    assert measures["teacher"]["recall"][0]["logprob"] == -123.0 and measures["teacher"]["costs"]
    run_tiny(other, "distill.lr=2e-5", "data.max_train_tokens=15000", from_stage="evaluate")
    assert done(other, "evaluate")["measures"]["teacher"]["recall"][0]["logprob"] > -100
