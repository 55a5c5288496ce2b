"""The trainer: interrupted anywhere and resumed it gives the same, bit for bit, and nothing that was saved is lost."""

import errno
import json
import logging
import os
import shutil
import signal
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings, strategies as st
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kill_often import kill_often
from run_files import TINY
from transpoint.distill.data.corpus import Corpus
from transpoint.distill.data.packed import PackedDataset, batch_indices, collate
from transpoint.distill.run.folder import StageFolder
from transpoint.distill.run.seconds import Clock, ticking
from transpoint.distill.settings import TrainConfig
from transpoint.distill.train import checkpoint
from transpoint.distill.train.trainer import Stopped, TrainingError, above_steady, learning_rate_factor, train

STEPS = 17
TRAINED = ("linear.weight", "linear.bias", "scale")


class Toy(nn.Module):
    """Predicts the next of 16 tokens; its dropout makes the result depend on the random generator."""

    def __init__(self, dropout=0.2):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.frozen = nn.Parameter(torch.randn(16, 6, generator=generator))
        self.linear = nn.Linear(6, 16)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(16, 6, generator=generator))
            self.linear.bias.zero_()
        self.scale = nn.Parameter(torch.ones(6))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch):
        ids = batch["input_ids"]
        logits = self.linear(self.dropout(self.frozen[ids[:, :-1]] * self.scale))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return loss, {"doubled": 2 * loss}


class Broken(Toy):
    """Its loss is not a number in some of its calls, counted from 1."""

    def __init__(self, *calls):
        super().__init__()
        self.broken, self.calls = calls, 0

    def forward(self, batch):
        self.calls += 1
        loss, figures = super().forward(batch)
        return (loss * float("nan") if self.calls in self.broken else loss), figures


class Overflowing(Toy):
    """A submodule's output is infinite."""

    def forward(self, batch):
        with torch.no_grad():
            self.linear.weight.fill_(3e38)
        return super().forward(batch)


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (10 * 8,), generator=generator).to(torch.uint16)
    return PackedDataset(Corpus(tokens, torch.tensor([0, 13, 40]), ""), 8)


def settings_of(**changes):
    return TrainConfig(**{"steps": STEPS, "batch_size": 4, "lr": 0.05, "log_every": 1, "checkpoint_every": 4} | changes)


def interrupt():
    raise KeyboardInterrupt


def go(folder, config, dataset, make=Toy, stop=None, stop_by=interrupt, names=TRAINED, figures=None):
    """Trains a fresh toy in `folder`, interrupted after step `stop`; returns its parameters and the steps it took."""
    torch.manual_seed(0)
    objective = make()
    parameters = {name: p for name, p in objective.named_parameters() if name in names}
    taken = []

    def on_step(step):
        taken.append(step)
        if step == stop:
            stop_by()

    folder.path.mkdir(parents=True, exist_ok=True)
    groups = [{"name": "all", "parameters": parameters, "lr": config.lr}]
    arguments = (config, dataset, folder, Accelerator(cpu=True, mixed_precision="no"), Console(quiet=True), 3)
    with pytest.raises(KeyboardInterrupt) if stop is not None and stop_by is interrupt else nullcontext():
        trained = train(objective, groups, *arguments, on_step=on_step)
        if figures is not None:
            figures.append(trained.metrics)
    return {name: p.detach().clone() for name, p in objective.named_parameters()}, taken


def metrics(folder):
    """The lines of metrics.jsonl, without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_kept(folder):
    return [int(p.name.removeprefix("step-")) for p in sorted((folder / "checkpoints").iterdir())]


@pytest.fixture
def folder(tmp_path):
    return StageFolder(tmp_path, "align")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """What the uninterrupted run gives: parameters and metrics."""
    folder = StageFolder(tmp_path_factory.mktemp("whole"), "align")
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken == list(range(1, STEPS + 1))
    return parameters, metrics(folder)


# Interrupted and resumed


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    stops=st.lists(st.integers(1, STEPS), max_size=4),
    every=st.integers(1, 6),
    keep=st.integers(1, 3),
    log_every=st.integers(1, 4),
)
def test_interrupted_and_resumed_equals_uninterrupted(stops, every, keep, log_every, dataset, whole):
    config = settings_of(checkpoint_every=every, keep_checkpoints=keep, log_every=log_every)
    with tempfile.TemporaryDirectory() as scratch:
        folder, done = StageFolder(Path(scratch), "align"), 0
        for stop in [*stops, None]:
            if stop is not None and stop <= done:  # it would never come to that step
                continue
            parameters, taken = go(folder, config, dataset, stop=stop)
            assert taken[0] == done + 1  # at most one interval is done again
            if stop is not None:
                done = min(stop // every, (STEPS - 1) // every) * every
        assert same(parameters, whole[0])
        logged = [line for line in whole[1] if line["step"] % log_every == 0 or line["step"] == STEPS]
        assert metrics(folder) == logged


def test_an_interrupt_before_the_first_checkpoint_starts_anew(folder, dataset, whole):
    go(folder, settings_of(), dataset, stop=3)
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 1 and same(parameters, whole[0]) and metrics(folder) == whole[1]


def test_training_that_ended_without_its_record_does_its_last_steps_again(folder, dataset, whole):
    config = settings_of(checkpoint_every=1)
    go(folder, config, dataset)
    parameters, taken = go(folder, config, dataset)
    assert taken == [STEPS] and same(parameters, whole[0])


def test_only_the_last_checkpoints_stay(folder, dataset):
    go(folder, settings_of(checkpoint_every=2, keep_checkpoints=3), dataset)
    assert steps_kept(folder) == [12, 14, 16]
    assert sorted(p.name for p in (folder / "checkpoints" / "step-00000016").iterdir()) == [
        "checkpoint.json",
        "state.safetensors",
    ]


def test_what_a_killed_save_left_does_no_harm(folder, dataset, whole):
    go(folder, settings_of(), dataset, stop=9)
    partial = folder / "checkpoints" / ".partial-00000012"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"cut off")
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 9 and same(parameters, whole[0]) and not partial.exists()


def damage(path, how):
    state, record = path / "state.safetensors", path / "checkpoint.json"
    if how == "truncated":
        state.write_bytes(state.read_bytes()[:-7])
    elif how == "flipped":
        raw = bytearray(state.read_bytes())
        raw[len(raw) // 2] ^= 1
        state.write_bytes(raw)
    elif how == "no state":
        state.unlink()
    elif how == "no record":
        record.unlink()
    elif how == "cut record":
        record.write_text(record.read_text()[:10])
    else:
        shutil.rmtree(path)
        path.mkdir()


@pytest.mark.parametrize("how", ["truncated", "flipped", "no state", "no record", "cut record", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(how, folder, dataset, whole, caplog):
    config = settings_of(checkpoint_every=2, keep_checkpoints=3)
    go(folder, config, dataset, stop=9)
    damaged = folder / "checkpoints" / "step-00000008"
    damage(damaged, how)
    with caplog.at_level(logging.WARNING):
        parameters, taken = go(folder, config, dataset)
    (warning,) = [m for m in caplog.messages if "checkpoint" in m]
    assert warning.startswith(f"checkpoint {damaged} is damaged (")
    assert warning.endswith("): going back to the one before") and "\n" not in warning
    assert taken[0] == 7 and same(parameters, whole[0]) and metrics(folder) == whole[1]


def test_when_all_checkpoints_are_damaged_it_starts_anew(folder, dataset, whole, caplog):
    go(folder, settings_of(), dataset, stop=9)
    for path in (folder / "checkpoints").iterdir():
        damage(path, "flipped")
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 1 and same(parameters, whole[0]) and metrics(folder) == whole[1]
    assert len([m for m in caplog.messages if "is damaged" in m]) == 2


def test_a_checkpoint_of_another_model_is_not_used(folder, dataset, caplog):
    go(folder, settings_of(), dataset, stop=9, names=("linear.weight",))
    _, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 1 and "it is of another model" in caplog.text


# Failures


def test_steps_without_a_finite_gradient_are_skipped_and_counted(folder, dataset):
    """As if the optimizer had not been there: nothing moves, and its own count of steps stands still."""
    parameters, taken = go(folder, settings_of(), dataset, lambda: Broken(6, 7, 12))
    lines = metrics(folder)
    assert taken[-1] == STEPS and all(p.isfinite().all() for p in parameters.values())
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == {6: 1, 7: 1, 12: 1}
    assert [line["step"] for line in lines if line["loss"] is None] == [6, 7, 12]
    state = load_file(folder / "checkpoints" / "step-00000016" / "state.safetensors")
    assert state["optimizer.step.scale"].item() == 16 - 3


def test_skipped_steps_stay_counted_after_a_resume(folder, dataset):
    go(folder, settings_of(), dataset, lambda: Broken(6, 7), stop=9)
    figures = []
    go(folder, settings_of(), dataset, lambda: Broken(1), figures=figures)  # its first call is of step 9
    assert figures[0]["skipped"] == 3


def test_too_many_steps_skipped_in_a_row_stop_in_one_line_and_leave_the_checkpoint(folder, dataset, whole):
    with pytest.raises(TrainingError) as caught:
        go(folder, settings_of(max_skipped=3), dataset, lambda: Broken(*range(9, 99)))
    assert str(caught.value) == (
        "align: the gradient was not finite in 3 steps in a row, the last of them step 11 (loss nan): first of all the "
        "loss. Lower align.lr or set run.precision=fp32: the weights are as they were before these steps, and the last "
        "checkpoint is intact"
    )
    assert steps_kept(folder) == [4, 8]
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 9 and same(parameters, whole[0]) and metrics(folder) == whole[1]


def test_what_is_not_finite_first_is_named(folder, dataset):
    with pytest.raises(TrainingError, match="first of all the output of linear. Lower align.lr"):
        go(folder, settings_of(max_skipped=1), dataset, Overflowing, names=("scale",))


def test_a_gradient_that_is_not_finite_is_named(folder, dataset):
    class Rooted(Toy):
        """The root's derivative is infinite at 0, where its own value is fine."""

        def forward(self, batch):
            loss, figures = super().forward(batch)
            return loss + (self.scale - self.scale.detach()).abs().sum().sqrt(), figures

    with pytest.raises(TrainingError, match="first of all the gradient of scale. Lower align.lr"):
        go(folder, settings_of(max_skipped=1), dataset, Rooted)


def test_steps_and_saving_are_timed_apart_and_kept_with_each_checkpoint(folder, dataset):
    kept = folder / "seconds.json"
    with ticking(Clock(kept)) as clock:
        go(folder, settings_of(), dataset, stop=9)
    at_the_checkpoint = json.loads(kept.read_text())["seconds"]
    assert 0 < at_the_checkpoint["saving"] and 0 < at_the_checkpoint["steps"] <= clock.record()["seconds"]["steps"]
    assert "compiling" not in clock.seconds  # on a CPU nothing is


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([(0, 1.0)], 0),
        ([(0, 1.0), (10, 9.0)], 0),  # there is no later line to tell
        ([(0, 1.0), (10, 36.0), (20, 56.0), (30, 79.0), (35, 89.0)], 15),  # 35 s, where others took 2, 2.3 and 2 s each
        ([(7, 5.0), (10, 15.0), (20, 25.0)], 7),  # resumed in the middle
        ([(0, 0.0), (10, 9.0), (20, 19.0)], 0),  # faster than steady
    ],
)
def test_what_the_first_line_took_above_the_pace_of_the_others(lines, seconds):
    assert above_steady(lines) == pytest.approx(seconds)


def test_a_loss_spike_is_told(folder, dataset, capsys):
    class Spiking(Broken):
        def forward(self, batch):
            loss, figures = Toy.forward(self, batch)
            self.calls += 1
            return loss * (9 if self.calls == 12 else 1), figures

    go(folder, settings_of(), dataset, Spiking)
    assert [line["step"] for line in metrics(folder) if line.get("event") == "loss spike"] == [12]


def test_sigterm_saves_and_stops(folder, dataset, whole):
    """At a step without a checkpoint of its own; going on from there changes nothing."""
    with pytest.raises(Stopped) as caught:
        go(folder, settings_of(), dataset, stop=6, stop_by=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert str(caught.value) == (
        "align: asked to stop (SIGTERM), saved at step 7 of 17; the same command goes on from there"
    )
    assert steps_kept(folder) == [4, 7]
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 8 and same(parameters, whole[0]) and metrics(folder) == whole[1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(error, folder, dataset, whole, monkeypatch):
    real = checkpoint.save_file

    def save_file(tensors, path):
        if "00000008" in str(path):
            path.write_bytes(b"the first part of it")
            raise error
        real(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(checkpoint, "save_file", save_file)
        go(folder, settings_of(), dataset)
    told = str(caught.value)
    assert told.startswith(f"checkpoint {folder / 'checkpoints' / 'step-00000008'} could not be written (")
    assert "No space left on device" in told and "\n" not in told
    assert told.endswith("earlier ones are intact: free some space, then run the same command to go on")
    assert steps_kept(folder) == [4]
    parameters, taken = go(folder, settings_of(), dataset)
    assert taken[0] == 5 and same(parameters, whole[0]) and metrics(folder) == whole[1]


def test_a_mistake_while_saving_is_not_called_a_full_disk(folder, dataset, monkeypatch):
    def save_file(tensors, path):
        raise RuntimeError("tensors share memory")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(RuntimeError, match="^tensors share memory$"):
        go(folder, settings_of(), dataset)
    assert steps_kept(folder) == []


@pytest.mark.parametrize("batch, micro", [(4, 3), (4, 8)])
def test_a_batch_that_cannot_be_cut(batch, micro, folder, dataset):
    with pytest.raises(TrainingError) as caught:
        go(folder, settings_of(batch_size=batch, micro_batch_size=micro), dataset)
    assert str(caught.value) == (
        f"align.batch_size is {batch}; expected a multiple of 1 processes times micro_batch_size {micro}"
    )


# What a step is


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_gives_the_whole_batch(micro, tmp_path, dataset):
    folders = [StageFolder(tmp_path, name) for name in ("whole", "parts")]
    a, _ = go(folders[0], settings_of(steps=5), dataset, lambda: Toy(dropout=0))
    b, _ = go(folders[1], settings_of(steps=5, micro_batch_size=micro), dataset, lambda: Toy(dropout=0))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    for x, y in zip(metrics(folders[0]), metrics(folders[1]), strict=True):
        assert x == pytest.approx(y, rel=1e-5)


def test_a_step_is_adamw_on_the_batch_of_its_number(folder, dataset):
    """The trainer against PyTorch written out, over warm-up, cosine and clipping."""
    config = settings_of(steps=6, warmup=0.4, clip=0.3, weight_decay=0.1, betas=[0.8, 0.9])
    found, _ = go(folder, config, dataset, lambda: Toy(dropout=0))
    toy = Toy(dropout=0)
    matrices, others = [toy.linear.weight], [toy.linear.bias, toy.scale]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9)
    )
    for step, record in enumerate(metrics(folder)):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * learning_rate_factor(step, config)
        optimizer.zero_grad()
        loss, _ = toy(collate([dataset[i] for i in batch_indices(len(dataset), 4, 3, step)]))
        loss.backward()
        norm = nn.utils.clip_grad_norm_([*matrices, *others], 0.3)
        optimizer.step()
        assert record == pytest.approx(
            {
                "step": step + 1,
                "loss": loss.item(),
                "doubled": 2 * loss.item(),
                "gradient_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "tokens": (step + 1) * 4 * 8,
            },
            rel=1e-4,
        )
    assert record["gradient_norm"] > 0.3  # it was clipped
    for name, parameter in toy.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_weight_decay_is_on_matrices_only(folder, dataset):
    class Still(nn.Module):
        """No gradient: all that moves is decay."""

        def __init__(self):
            super().__init__()
            shapes = {"matrix": (3, 4), "vector": (4,), "scalar": (), "taps": (4, 1, 3)}
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.ones(shape)))

        def forward(self, batch):
            return 0 * sum(p.sum() for p in self.parameters()), {}

    config = settings_of(steps=1, lr=0.1, weight_decay=0.5, warmup=0.0)
    found, _ = go(folder, config, dataset, Still, names=("matrix", "vector", "scalar", "taps"))
    torch.testing.assert_close(found.pop("matrix"), torch.full((3, 4), 1 - 0.1 * 0.5))
    for name, value in found.items():
        assert torch.equal(value, torch.ones_like(value)), name


def test_groups_have_their_own_learning_rate_and_the_rest_stays(folder, dataset):
    toy = Toy(dropout=0)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    groups = [
        {"name": "fast", "parameters": {"scale": toy.scale}, "lr": 0.1},
        {"name": "slow", "parameters": {"linear.weight": toy.linear.weight}, "lr": 0.001},
    ]
    folder.path.mkdir()
    config = settings_of(steps=1, warmup=0.0)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    figures = train(toy, groups, config, dataset, folder, accelerator, Console(quiet=True), 0).metrics
    # Adam's first step is the learning rate itself, with the gradient's sign.
    for name, lr in (("scale", 0.1), ("linear.weight", 0.001), ("linear.bias", 0.0), ("frozen", 0.0)):
        moved = (dict(toy.named_parameters())[name].detach() - before[name]).abs()
        assert moved.max().item() == pytest.approx(lr, rel=1e-2, abs=1e-12), name
    assert not toy.frozen.requires_grad and toy.linear.bias.grad is None
    assert figures["tokens"] == 4 * 8 and figures["step"] == 1 and figures["seconds"] > 0


def test_no_steps_leave_everything_as_it_is(folder, dataset):
    found, taken = go(folder, settings_of(steps=0), dataset)
    assert taken == [] and same(found, {name: p.detach() for name, p in Toy().named_parameters()})


@pytest.mark.parametrize("steps, warmup, final", [(100, 0.1, 0.2), (20, 0.0, 0.0), (7, 1.0, 0.5), (1, 0.05, 0.1)])
def test_the_learning_rate_rises_then_falls_along_a_cosine(steps, warmup, final):
    config = settings_of(steps=steps, warmup=warmup, final_lr=final)
    factors = [learning_rate_factor(step, config) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert max(factors) == factors[rise - 1] == 1
    assert all(a >= b for a, b in zip(factors[rise:], factors[rise + 1 :], strict=False))
    assert learning_rate_factor(steps, config) == pytest.approx(final if rise < steps else 1)
    if steps == 100:
        assert learning_rate_factor(55, config) == pytest.approx((1 + final) / 2)  # half way down


# A run that is killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_kills_at_random_moments_change_no_bit(seed, tmp_path, run_tiny, capfd):
    more = ["align.steps=4", "distill.steps=16", "align.checkpoint_every=2", "distill.checkpoint_every=2"]
    more += ["align.log_every=1", "distill.log_every=1", "data.length=32", "evaluate.sequences=2"]
    run_tiny(tmp_path / "whole", *more, until_stage="distill")
    command = ["run", str(TINY), f"run.dir={tmp_path / 'killed'}", *more, "--until", "distill"]
    killed, code = kill_often(8, seed, command, tmp_path / "killed")
    assert code == 0, capfd.readouterr().err[-4000:]
    assert sum(killed.values()) == 8
    assert {"after calibrate", "after align"} <= killed.keys(), killed
    for stage in ("align", "distill"):
        weights = [tmp_path / name / stage / "student" / "model.safetensors" for name in ("whole", "killed")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert metrics(StageFolder(tmp_path / "whole", stage)) == metrics(StageFolder(tmp_path / "killed", stage))
