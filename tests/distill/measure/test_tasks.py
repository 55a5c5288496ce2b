"""Tasks of lm-evaluation-harness: the scores are those of the model's own logits, and nothing asks the network."""

import json
import math
import socket
import sys

import datasets
import pytest
import torch
import yaml

from transpoint.distill.errors import RunError
from transpoint.distill.measure.tasks import check_tasks, measure_tasks
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

pytestmark = pytest.mark.stack

TEXTS = ["a tale of", "one two three", "x", "the quick brown fox", "no", "rain and snow"]
CHOICES = [" yes", " maybe", " n"]
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": CHOICES,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{generated}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "filter_list": [
            {"name": "none", "filter": [{"function": "take_first"}]},
            {"name": "empty", "filter": [{"function": "regex", "regex_pattern": "^$"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


@pytest.fixture(scope="module")
def loaded():
    teacher, tokenizer = random_teacher("random-llama")
    return teacher.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def student(loaded):
    return build_student(loaded[0], StudentConfig(keep_attention=[1]))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(loaded, tmp_path):
    """Task files in tasks/, their data beside it in data/. Some answers are the teacher's own."""
    teacher, tokenizer = loaded
    rows = []
    for i, text in enumerate(TEXTS):
        best = generated(teacher, tokenizer, text)
        own = tokenizer.decode(logits(teacher, tokenizer, text, 1)[0].argmax())
        rows.append(
            {
                "text": text,
                "target": own if i % 3 == 0 and own.isascii() else " then",
                "gold": i % 3,
                "generated": best if i % 2 else "something else",
            }
        )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        write_task(tmp_path / "tasks", name, task)
    return str(tmp_path / "tasks"), rows


def write_task(folder, name, task, file="data/rows.jsonl"):
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))


def logits(model, tokenizer, text, last):
    """Of the last tokens of a text, in float32."""
    return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -last:].float()


def logprobs(model, tokenizer, context, answer):
    """Of each token of the answer, and whether it is the most likely one."""
    ids = tokenizer(answer)["input_ids"]
    given = logits(model, tokenizer, context + answer, len(ids) + 1)[:-1].log_softmax(-1)
    return given[range(len(ids)), ids], given.argmax(-1) == torch.tensor(ids)


def generated(model, tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    for _ in range(6):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    answer = tokenizer.decode(ids[len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True)
    return answer.partition("\n\n")[0]


def by_hand(model, tokenizer, rows):
    words = [logprobs(model, tokenizer, row["text"], row["target"]) for row in rows]
    sums = [[logprobs(model, tokenizer, row["text"], choice)[0].sum().item() for choice in CHOICES] for row in rows]
    norm = [[value / len(choice) for value, choice in zip(one, CHOICES, strict=True)] for one in sums]
    answers = [generated(model, tokenizer, row["text"]) for row in rows]
    golds = [row["gold"] for row in rows]
    return {
        ("word", "perplexity"): [math.exp(-sum(p.sum().item() for p, _ in words) / len(rows))],
        ("word", "acc"): [float(best.all()) for _, best in words],
        ("choice", "acc"): [float(one.index(max(one)) == gold) for one, gold in zip(sums, golds, strict=True)],
        ("choice", "acc_norm"): [
            float(one.index(max(one)) == row["gold"]) for one, row in zip(norm, rows, strict=True)
        ],
        ("answer", "exact_match"): [float(a == row["generated"]) for a, row in zip(answers, rows, strict=True)],
        ("answer", "exact_match,empty"): [
            float((answer and "[invalid]") == row["generated"]) for answer, row in zip(answers, rows, strict=True)
        ],
    }


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_scores_are_those_of_the_models_own_logits(which, batch_size, loaded, student, folder, monkeypatch, capfd):
    model, tokenizer = loaded[0] if which == "teacher" else student, loaded[1]
    monkeypatch.chdir("/")
    scores = measure_tasks(model, tokenizer, list(TASKS), folder[0], None, batch_size)
    assert capfd.readouterr() == ("", "")
    expected = by_hand(model, tokenizer, folder[1])
    assert [(score.task, score.metric) for score in scores] == list(expected)
    for score in scores:
        each = expected[score.task, score.metric]
        assert score.value == pytest.approx(sum(each) / len(each), rel=1e-4), score
        assert score.samples == len(TEXTS) and score.higher_is_better is (score.metric != "perplexity")
        if score.metric != "perplexity":
            assert score.stderr == pytest.approx(torch.tensor(each).std().item() / len(each) ** 0.5, abs=1e-6)
    if which == "teacher":  # the figures tell something
        assert 0 < expected["word", "acc"].count(1) < len(TEXTS)
        assert expected["answer", "exact_match"].count(1) == len(TEXTS) // 2


def test_the_first_documents_alone_and_the_model_and_tokenizer_as_they_were(loaded, folder):
    teacher, tokenizer = loaded
    pad, tokenizer.pad_token = tokenizer.pad_token, None
    teacher.train()
    try:
        scores = measure_tasks(teacher, tokenizer, ["choice"], folder[0], limit=2)
        assert teacher.training and tokenizer.pad_token is None
    finally:
        tokenizer.pad_token = pad
        teacher.eval()
    expected = by_hand(teacher, tokenizer, folder[1][:2])
    assert [score.value for score in scores] == [sum(expected["choice", m]) / 2 for m in ("acc", "acc_norm")]
    assert {score.samples for score in scores} == {2}


def test_data_files_are_found_from_here_from_the_task_files_and_from_above(loaded, folder, tmp_path, monkeypatch):
    teacher, tokenizer = loaded
    rows = (tmp_path / "data" / "rows.jsonl").read_text()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text("".join(rows.splitlines(True)[:1]))
    (tmp_path / "tasks" / "mine.jsonl").write_text("".join(rows.splitlines(True)[:3]))
    write_task(tmp_path / "tasks", "word", TASKS["word"], file=["mine.jsonl"])
    for place, samples in ((tmp_path / "here", 1), (tmp_path, 3)):
        monkeypatch.chdir(place)
        assert measure_tasks(teacher, tokenizer, ["word"], folder[0])[0].samples == samples
    monkeypatch.chdir(tmp_path)
    assert measure_tasks(teacher, tokenizer, ["choice"], "tasks")[0].samples == len(TEXTS)  # a relative folder
    assert measure_tasks(teacher, tokenizer, ["word"], "tasks")[0].samples == 3
    write_task(tmp_path / "tasks", "word", TASKS["word"], file=["here/mine.jsonl"])  # is read anew
    assert measure_tasks(teacher, tokenizer, ["word"], "tasks")[0].samples == 1


def test_tasks_of_the_harness_itself(folder):
    check_tasks(["piqa", "word"], folder[0])
    with pytest.raises(RunError, match="^task 'piqq' is not known to lm_eval; did you mean .*'piqa'"):
        check_tasks(["piqa", "piqq"])


def test_an_unknown_task(loaded, folder):
    with pytest.raises(RunError) as raised:
        measure_tasks(*loaded, ["word", "choise"], folder[0])
    assert str(raised.value).startswith(f"task 'choise' is not known to lm_eval, nor in '{folder[0]}'; did you mean ")
    assert "'choice'" in str(raised.value)


def test_no_folder(loaded):
    with pytest.raises(RunError, match="^there is no folder of tasks 'nowhere'$"):
        measure_tasks(*loaded, ["word"], "nowhere")


def test_a_task_that_fails(loaded, folder, tmp_path):
    write_task(tmp_path / "tasks", "choice", TASKS["choice"], file="data/none.jsonl")
    with pytest.raises(RunError, match=r"^task 'choice' fails: Unable to find .*none.jsonl") as raised:
        measure_tasks(*loaded, ["word", "choice"], folder[0])
    assert "\n" not in str(raised.value)


def test_without_the_package(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"^lm_eval is missing: pip install 'transpoint\[eval\]'$"):
        measure_tasks(*loaded, ["word"])
