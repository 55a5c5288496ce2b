"""tune: its loss written out, what it trains, on which rows, and its place in a run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from run_files import TINY, done, metrics, student as weights_of
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.data.sources import DataError
from transpoint.distill.errors import RunError
from transpoint.distill.objectives import AnswerTuning
from transpoint.distill.stages import stage_inputs
from transpoint.distill.stages.tune import TuneConfig
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

TUNE = ("tune.steps=6", "tune.batch_size=2", "tune.lr=3e-3", "tune.log_every=2", "tune.checkpoint_every=2")
WORDS = "to be or not that is the question whether it may".split()


def make(**options):
    teacher = random_teacher("random-llama")[0].requires_grad_(False)
    return teacher, build_student(teacher, StudentConfig(**{"keep_attention": [2], **options}))


@pytest.fixture
def batch():
    """Two sequences of 20 tokens, one of them packed from two documents, with 11 tokens of answers to be predicted."""
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(20), torch.cat([torch.arange(8), torch.arange(12)])])
    counts = torch.zeros(2, 20, dtype=torch.bool)
    counts[0, 4:8] = counts[0, 16:19] = counts[1, 5:7] = counts[1, 8:10] = True
    return {
        "input_ids": ids,
        "position_ids": positions,
        "before_answer": counts,
        "per_answer": torch.full((2,), 2 / 11),
    }


def written_out(teacher, student, batch, loss, temperature=1.0):
    """The sum over the tokens of answers, of each document alone: all but a document's first are predicted."""
    total = 0
    for ids, positions, counted, _ in zip(*batch.values(), strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for a, b in zip(starts, starts[1:], strict=False):
            document, counts = ids[None, a:b], counted[a : b - 1]
            p, q = (
                (model(document, use_cache=False).logits[0, :-1].double() / temperature).log_softmax(-1)
                for model in (teacher, student)
            )
            kl = (p.exp() * (p - q)).sum(-1) * temperature**2
            ce = -q.gather(1, document[0, 1:, None])[:, 0]
            total += ((kl if loss == "kd" else ce) * counts).sum()
    return total


@pytest.mark.parametrize("options", [{}, {"mixer": "transmamba", "trans_points": 7}], ids=str)
@pytest.mark.parametrize("settings", [{"loss": "kd"}, {"loss": "kd", "temperature": 2.0}, {"loss": "ce"}], ids=str)
def test_the_loss_counts_answers_alone(settings, options, batch):
    teacher, student = make(**options)
    config = TuneConfig(**settings)
    objective = AnswerTuning(teacher if config.loss == "kd" else None, student, config)
    loss, figures = objective(batch)
    expected = written_out(teacher, student, batch, config.loss, config.temperature) / 11
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    assert figures["kl" if config.loss == "kd" else "ce"] == loss and not next(iter(figures.values())).requires_grad
    parameters = list(student.parameters())
    found, wanted = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for name, own, gradient in zip(dict(student.named_parameters()), found, wanted, strict=True):
        assert (own - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_what_follows_an_answer_makes_no_difference_and_what_it_is_does(loss, batch):
    teacher, student = make()
    batch["before_answer"][0, 16:] = False
    objective = AnswerTuning(teacher if loss == "kd" else None, student, TuneConfig(loss=loss))

    def at(place):
        ids = batch["input_ids"].clone()
        ids[0, place] += 1
        return objective(batch | {"input_ids": ids})[0]

    before = objective(batch)[0]
    for place in (9, 12, 19):
        assert at(place) == before
    assert at(8) != before if loss == "ce" else at(8) == before  # the last token of an answer is predicted from others
    assert at(7) != before and at(2) != before


def test_gradients_of_micro_batches_add_up_however_many_answers_they_hold(batch):
    teacher, student = make()
    batch["before_answer"][1] = False
    objective = AnswerTuning(teacher, student, TuneConfig())

    def gradient(*rows):
        student.zero_grad()
        for row in rows:
            (objective({name: values[row] for name, values in batch.items()})[0] / len(rows)).backward()
        return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    whole, pieces = gradient(slice(0, 2)), gradient(slice(0, 1), slice(1, 2))
    assert (whole - pieces).norm() / whole.norm() < 1e-4


# In a run


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of chats and completions, and rows that hold no answer."""
    draw = torch.Generator().manual_seed(0)

    def words():
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=draw).tolist())

    roles = ("user", "assistant") * 2
    rows = [{"messages": [{"role": role, "content": words()} for role in roles]} for _ in range(20)]
    rows += [{"prompt": words(), "completion": words()} for _ in range(20)] + [{"text": words()}] * 3
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tuned(tiny_run, run_tiny, chats, tmp_path_factory):
    """A run that was tuned, and what it printed. Only to be read."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny_run, folder)
    return folder, run_tiny(folder, *TUNE, f"tune.train=[{chats}]", until_stage="tune")


def test_tune_is_a_stage_of_runs_that_ask_for_it(tiny_run, tuned):
    folder, out = tuned
    assert "tune" not in stage_inputs(load_recipe(tiny_run / "recipe.yaml"))
    assert "distill: done before, reused" in out and "tune: not run yet" in out
    assert "of them in 60 answers; skipped 3: 3 no answer (first: chats.jsonl line 41)" in out
    assert done(folder, "tune")["training"]["tokens"] == 6 * 2 * 64
    assert metrics(folder, "tune")[-1]["kl"] == metrics(folder, "tune")[-1]["loss"]
    assert done(folder, "tune")["quality"]["kl"] != done(folder, "distill")["quality"]["kl"]


def test_what_was_the_teachers_stays_as_it_is(tuned):
    before, after = (load_file(tuned[0] / stage / "student" / "model.safetensors") for stage in ("distill", "tune"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(".self_attn." in name for name in changed)
    assert {name.split(".")[2] for name in changed} == {"0", "2"}  # every second layer keeps attention


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(tuned, chats, run_tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tuned[0], folder, ignore=shutil.ignore_patterns("tune"))

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    options = (*TUNE, f"tune.train=[{chats}]")
    with pytest.raises(KeyboardInterrupt):
        run_tiny(folder, *options, until_stage="tune", on_step=stop)
    assert "tune: going on from step 2" in run_tiny(folder, *options, until_stage="tune")
    assert weights_of(folder, "tune") == weights_of(tuned[0], "tune")
    assert metrics(folder, "tune") == metrics(tuned[0], "tune")


@pytest.mark.slow
def test_cross_entropy_on_the_runs_own_chats(tuned, chats, run_tiny, tmp_path):
    """On attention as well, and with micro-batches."""
    folder = tmp_path / "run"
    shutil.copytree(tuned[0], folder, ignore=shutil.ignore_patterns("tune"))
    options = ("tune.loss=ce", "tune.groups.attention.lr=1e-3", "tune.micro_batch_size=1")
    out = run_tiny(folder, *TUNE, f"tune.train=[{chats}]", *options, "tune.steps=20", until_stage="tune")
    assert "tune: not run yet" in out
    lines = metrics(folder, "tune")
    assert "kl" not in lines[0] and lines[-1]["ce"] < 0.8 * lines[0]["ce"]
    before, after = (load_file(folder / stage / "student" / "model.safetensors") for stage in ("distill", "tune"))
    kept = [name for name in before if name.startswith("model.layers.1.self_attn.")]
    assert kept and not any(torch.equal(before[name], after[name]) for name in kept)


def test_other_chats_are_another_result(chats, tmp_path):
    def needs(*overrides):
        return stage_inputs(load_recipe(TINY, [f"run.dir={tmp_path}", *TUNE, *overrides]))["tune"]

    own = f"tune.train=[{chats}]"
    copied = shutil.copy(chats, tmp_path / "moved.jsonl")
    assert needs(own) == needs(f"tune.train=[{copied}]") != needs()
    assert needs(own, "tune.temperature=2") != needs(own)
    assert needs(own, "tune.loss=ce", "tune.temperature=2") == needs(own, "tune.loss=ce") != needs(own)
    copied.write_text(copied.read_text() + json.dumps({"prompt": "a", "completion": "b"}))
    assert needs(f"tune.train=[{copied}]") != needs(own)


def test_text_without_an_answer_is_refused_before_anything_is_trained(run_tiny, tmp_path):
    with pytest.raises(DataError) as caught:
        run_tiny(tmp_path / "run", *TUNE)
    assert "\n" not in str(caught.value) and "no answer (first: train.jsonl.zst line 1)" in str(caught.value)
    assert str(caught.value).endswith("give rows of messages, or of prompt and completion, in tune.train")
    assert not (tmp_path / "run" / "transfer").exists()
    with pytest.raises(RunError, match="data.streaming is true: name chats in tune.train"):
        run_tiny(tmp_path / "run", *TUNE, "data.streaming=true", "data.max_train_tokens=null")


def test_a_token_limit_before_the_first_answer(run_tiny, tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text(json.dumps({"prompt": "a" * 300, "completion": "b"}))
    with pytest.raises(DataError) as caught:
        run_tiny(tmp_path / "run", *TUNE, f"data.train=[{path}]", "data.max_train_tokens=200")
    assert str(caught.value) == (
        f"no answer in the first 200 tokens of {path}: raise data.max_train_tokens, or name chats in tune.train"
    )


def test_nothing_to_train(tuned, chats, run_tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tuned[0], folder, ignore=shutil.ignore_patterns("tune"))
    with pytest.raises(RunError, match="tune trains nothing: .*; set tune.groups or tune.lora"):
        run_tiny(folder, *TUNE, f"tune.train=[{chats}]", "tune.groups.mixers.lr=0", until_stage="tune")


def test_plan_says_what_tune_will_train(chats, capsys):
    lora = ("distill.lora.rank=4", "tune.lora.rank=2")  # each stage has its own
    assert main(["plan", str(TINY), *TUNE, *lora, f"tune.train=[{chats}]"]) == 0
    out = capsys.readouterr().out
    assert out.count("tune: what will run") == 1
    counts = [int(line.split("│")[2].replace(",", "")) for line in out.splitlines() if "│ lora" in line]
    assert len(counts) == 2 and counts[0] == 2 * counts[1]
