"""The offline teacher: what a cache holds, that distill reads it as it would the teacher, and what is refused."""

import io
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import fresh
from forked import in_one
from run_files import TINY, done, metrics, student
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.data import teacher_cache
from transpoint.distill.data.packed import batch_indices, collate
from transpoint.distill.data.teacher_cache import CachedTargets, cache_teacher, items_of_distill
from transpoint.distill.errors import RunError
from transpoint.distill.objectives import CachedDistillation, Distillation
from transpoint.distill.stages.runner import run_recipe
from transpoint.distill.stages.session import Session
from transpoint.students import StudentConfig, build_student
from transpoint.teachers import output_head

VOCAB = 259  # of the tiny teacher
SMALL = ["data.max_train_tokens=1400", "data.length=32", "cache_teacher.batch_size=4"]  # 43 sequences


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def write(folder):
    """write(*overrides) -> (session, what was printed): caches the tiny teacher's predictions."""

    def run(*overrides):
        out = io.StringIO()
        session = open_session(folder, *overrides, out=out)
        cache_teacher(*parts(session))
        return session, out.getvalue()

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A cache as `write()` writes it. Only to be read."""
    folder = tmp_path_factory.mktemp("plain") / "cache"
    cache_teacher(*parts(open_session(folder)))
    return folder


def open_session(folder, *overrides, out=None):
    overrides = [*SMALL, f"run.dir={folder.parent / 'run'}", f"distill.teacher_cache={folder}", *overrides]
    return Session(load_recipe(TINY, ["run.precision=fp32", *overrides]), Console(file=out or io.StringIO(), width=200))


def parts(session):
    return session.recipe, session.teacher, session.train_data, session.accelerator, session.console, session.precision


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def logits(session, items):
    with torch.no_grad():
        return session.teacher(**collate([session.train_data[i] for i in items]), use_cache=False).logits


# What a cache holds


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
def test_items_hold_the_teachers_predictions(write, folder, dtype, tolerance):
    session, _ = write(
        f"cache_teacher.dtype={dtype}", "cache_teacher.k=7", "distill.temperature=2", "cache_teacher.hidden=true"
    )
    cached = CachedTargets(session.train_data, folder)
    cached.check(session.recipe, output_head(session.teacher))
    assert len(cached) == 43 and cached.tokens_per_item == 32
    for i in (0, 21, 42):
        item, plain = cached[i], session.train_data[i]
        log = (logits(session, [i])[0] / 2).log_softmax(-1)
        top, ids = log.topk(7)
        rest = log.scatter(1, ids, -math.inf).logsumexp(-1)
        assert torch.equal(item["input_ids"], plain["input_ids"])
        assert torch.equal(item["position_ids"], plain["position_ids"])
        assert torch.equal(item["teacher_ids"].long(), ids)
        torch.testing.assert_close(item["teacher_logprobs"], top, rtol=0, atol=tolerance)
        torch.testing.assert_close(item["teacher_rest"], rest, rtol=0, atol=tolerance)
        total = item["teacher_logprobs"].exp().sum(-1) + item["teacher_rest"].exp()
        torch.testing.assert_close(total, torch.ones(32))
        with torch.no_grad():
            hidden = session.teacher.get_decoder()(**collate([plain])).last_hidden_state[0]
        torch.testing.assert_close(item["teacher_hidden"], hidden, rtol=tolerance, atol=tolerance)
    assert load_file(folder / "shard-00000.safetensors")["ids"].dtype == torch.uint16


def test_what_truncation_costs_is_said_and_recorded(write, folder):
    session, _ = write("cache_teacher.k=16", "cache_teacher.dtype=float32")
    log = logits(session, range(43)).log_softmax(-1).flatten(0, 1).double()
    top, ids = log.topk(16)
    rest = 1 - top.exp().sum(-1, keepdim=True)
    even = (rest / (VOCAB - 16)).log().expand_as(log).scatter(1, ids, top)
    index = json.loads((folder / "index.json").read_text())
    assert index["kl"] == pytest.approx((log.exp() * (log - even)).sum(-1).mean().item(), rel=1e-4)
    assert index["rest_mass"] == pytest.approx(rest.mean().item(), rel=1e-4)
    assert f"{index['kl']:.4f} nats a token" in CachedTargets(session.train_data, folder).summary


def test_whole_predictions_cost_nothing(write, folder):
    write(f"cache_teacher.k={VOCAB}", "cache_teacher.dtype=float32")
    index = json.loads((folder / "index.json").read_text())
    assert abs(index["kl"]) < 1e-6 and index["rest_mass"] == 0


def test_batches_are_those_of_the_text(plain, folder):
    session = open_session(folder)
    cached = CachedTargets(session.train_data, plain)
    for step in (0, 7, 30):
        got, want = (data.batch(step, 4, 3, range(1, 3)) for data in (cached, session.train_data))
        for a, b, i in zip(got, want, batch_indices(43, 4, 3, step)[1:3], strict=True):
            assert torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["teacher_ids"], cached[i]["teacher_ids"])
    assert [sorted(item) for item in cached.spread(2)] == [["input_ids", "position_ids"]] * 2


def test_only_what_distill_takes_is_cached_and_more_is_added(write, folder):
    few, more = ["distill.steps=3", "distill.batch_size=4"], ["distill.steps=8", "distill.batch_size=4"]
    session, _ = write(*few)
    needed = items_of_distill(session.recipe, 43)
    assert (
        sorted(needed) == sorted({i for step in range(3) for i in batch_indices(43, 4, 0, step)}) and len(needed) == 12
    )
    assert load_file(folder / "shard-00000.safetensors")["items"].tolist() == list(needed)
    before = shards(folder)
    longer = open_session(folder, *more)
    cached = CachedTargets(longer.train_data, folder)
    with pytest.raises(
        RunError, match="lacks 20 of the 32 sequences of distill: `transpoint cache-teacher CONFIG` again"
    ):
        cached.check(longer.recipe, output_head(longer.teacher))
    with pytest.raises(RunError, match="lacks sequence"):
        cached.batch(5, 4, 0, range(4))
    session, _ = write(*more)
    after = shards(folder)
    assert before.items() < after.items()
    CachedTargets(session.train_data, folder).check(session.recipe, output_head(session.teacher))
    items = [load_file(folder / name)["items"] for name in after]
    assert sorted(torch.cat(items).tolist()) == list(items_of_distill(session.recipe, 43))
    assert len(items_of_distill(load_recipe(TINY, ["distill.steps=100"]), 43)) == 43


def test_shards_are_read_where_they_are_needed(tmp_path):
    """Opening and reading a few items of a large cache takes little memory."""
    script = f"""
import resource, torch
from safetensors.torch import save_file
from transpoint.distill.data import teacher_cache as t
n, L, k = 64, 512, 512
save_file({{"items": torch.arange(n), "ids": torch.zeros(n, L, k, dtype=torch.int32),
           "logprobs": torch.zeros(n, L, k), "rest": torch.zeros(n, L)}}, {str(tmp_path / "shard-00000.safetensors")!r})
t.write_json(t.Path({str(tmp_path)!r}) / "index.json", {{"format": 1, "hidden": False, "shards": [
    {{"file": "shard-00000.safetensors", "sha256": "", "sequences": n}}]}})
class Data:
    tokens_per_item = L
    def __len__(self): return n
    def __getitem__(self, i): return {{}}
def rss():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
before = rss()
cached = t.CachedTargets(Data(), {str(tmp_path)!r}, verify=False)
cached[3], cached[60]
print(rss() - before)
"""
    grown = float(fresh.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ).stdout)
    assert grown < 40  # MB, of 134


# Distillation


def make(session):
    student = build_student(session.teacher, StudentConfig(keep_attention=[0, 2]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mixer in filter(None, student.mixer_layers()):
            for parameter in mixer.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("extra", [[], ["distill.divergence=jsd", "distill.ce_weight=0.3"]])
@pytest.mark.parametrize("whole", ["cache_teacher.k=259", "cache_teacher.hidden=true"])
def test_whole_predictions_give_the_loss_and_gradients_of_the_teacher(write, folder, whole, extra):
    session, _ = write(whole, "cache_teacher.dtype=float32", "distill.temperature=1.5", *extra)
    settings = session.recipe.distill
    cached, student = CachedTargets(session.train_data, folder), make(session)
    head = output_head(session.teacher) if "hidden" in whole else None
    found = []
    for objective, items in (
        (Distillation(session.teacher, student, settings), session.train_data.batch(0, 4, 0, range(4))),
        (CachedDistillation(student, settings, VOCAB, head), cached.batch(0, 4, 0, range(4))),
    ):
        loss, figures = objective(collate(items))
        student.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((loss.detach(), figures, gradients))
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][2].items():
        error = (found[1][2][name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, name


def test_fewer_tokens_give_a_lower_bound(write, folder, tmp_path):
    losses = []
    for k in (4, 64, VOCAB):
        shutil.rmtree(folder, ignore_errors=True)
        session, _ = write(f"cache_teacher.k={k}", "cache_teacher.dtype=float32")
        cached = CachedTargets(session.train_data, folder)
        with torch.no_grad():
            losses.append(
                CachedDistillation(make(session), session.recipe.distill, VOCAB)(
                    collate(cached.batch(0, 4, 0, range(4)))
                )[0].item()
            )
    assert 0.01 < losses[0] < losses[1] < losses[2]


def test_figures_of_a_transmamba_student_are_those_of_distillation(plain, folder):
    session = open_session(folder)
    student = build_student(session.teacher, StudentConfig(mixer="transmamba", trans_points=8))
    cached = collate(CachedTargets(session.train_data, plain).batch(0, 4, 0, range(4)))
    with torch.no_grad():
        _, got = CachedDistillation(student, session.recipe.distill, VOCAB)(cached)
        _, want = Distillation(session.teacher, student, session.recipe.distill)(cached)
    assert set(got) == set(want) and got["attention"] == want["attention"]


@pytest.fixture(scope="module")
def teacher_run(tiny_run, tmp_path_factory, run_tiny):
    """A run of the first stages, distilled from the teacher itself, in float32. Only to be read."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("teacher") / "run")
    run_tiny(folder, "run.precision=fp32", until_stage="distill")
    return folder


@pytest.fixture(scope="module")
def cached_run(teacher_run, tmp_path_factory):
    """The same distilled from a cache of whole predictions: its folder, the cache, what was printed, how often the
    teacher had been called at each training step, and how often in all. Only to be read."""
    root = tmp_path_factory.mktemp("cached")
    shutil.copytree(teacher_run, root / "run")
    recipe = load_recipe(TINY, whole(root / "run", root / "cache"))
    out, seen, calls = io.StringIO(), [], []
    session = Session(recipe, Console(file=out, width=200))
    cache_teacher(*parts(session))
    session.teacher.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    forward = CachedDistillation.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CachedDistillation, "forward", lambda self, *args: seen.append(len(calls)) or forward(self, *args)
        )
        patch.setattr("transpoint.distill.stages.runner.Session", lambda *_: session)
        run_recipe(recipe, until_stage="distill", console=session.console)
    return SimpleNamespace(folder=root / "run", cache=root / "cache", said=out.getvalue(), seen=seen, calls=len(calls))


@pytest.fixture
def copy(teacher_run, tmp_path):
    """A run of one's own, distilled from the teacher."""
    return Path(shutil.copytree(teacher_run, tmp_path / "run"))


def whole(run, cache):
    cached = [f"distill.teacher_cache={cache}", f"cache_teacher.k={VOCAB}", "cache_teacher.dtype=float32"]
    return [f"run.dir={run}", "run.precision=fp32", *cached]


@pytest.mark.slow
def test_distilling_from_whole_predictions_is_distilling_from_the_teacher(cached_run, teacher_run):
    run, said = cached_run.folder, cached_run.said
    assert "align: done before, reused" in said and "distill: the teacher is read from " in said
    got, want, before = (
        load_file(root / stage / "student" / "model.safetensors")
        for root, stage in ((run, "distill"), (teacher_run, "distill"), (run, "align"))
    )
    for name in want:
        moved = (want[name] - before[name]).float().norm()
        assert (got[name] - want[name]).float().norm() < 0.05 * moved, name
    assert done(run, "distill")["teacher_cache"]["k"] == VOCAB
    got, want = (done(root, "distill")["quality"]["kl"] for root in (run, teacher_run))
    assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_the_teacher_is_not_run_while_distill_trains(cached_run):
    assert len(cached_run.seen) == 20 and set(cached_run.seen) == {0}
    assert cached_run.calls  # held-out quality is measured against the teacher itself


@pytest.mark.slow
def test_a_resumed_run_from_a_cache_is_the_same(cached_run, copy):
    run, cache = cached_run.folder, cached_run.cache

    def stop(step):
        if step == 13:
            raise KeyboardInterrupt

    recipe = load_recipe(TINY, whole(copy, cache))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, until_stage="distill", console=Console(quiet=True), on_step=stop)
    run_recipe(recipe, until_stage="distill", console=Console(quiet=True))
    assert student(copy, "distill") == student(run, "distill")
    assert metrics(copy, "distill") == metrics(run, "distill")


@pytest.mark.slow
def test_distill_depends_on_the_targets_of_the_cache_not_on_its_place(cached_run, tmp_path):
    run, cache = cached_run.folder, cached_run.cache
    moved, copy = shutil.copytree(cache, tmp_path / "moved"), shutil.copytree(run, tmp_path / "run")
    out = io.StringIO()
    recipe = load_recipe(TINY, whole(copy, moved))
    run_recipe(recipe, until_stage="distill", console=Console(file=out, width=200))
    assert "distill: done before, reused" in out.getvalue()
    recipe.distill.teacher_cache = str(tmp_path / "none")
    with pytest.raises(RunError, match="holds no teacher cache"):
        run_recipe(recipe, until_stage="distill", console=Console(quiet=True))


# What is refused before anything trains


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["data.max_train_tokens=1300"], "a cache of another text: set distill.teacher_cache to another folder"),
        (["distill.hidden_weight=0.1"], "distill.hidden_weight needs the hidden states of all layers, which no cache"),
        (["data.length=16"], r"a cache of another data.length \(32, not 16\)"),
        (["distill.temperature=2"], r"a cache of another distill.temperature \(1.0, not 2.0\)"),
        (["teacher.source=random-qwen2"], "a cache of another teacher.source"),
        (["teacher.dtype=bfloat16"], r"a cache of another teacher.dtype \(float32, not bfloat16\)"),
    ],
)
def test_a_cache_of_something_else_is_refused(plain, folder, overrides, told):
    shutil.copytree(plain, folder)
    before = shards(folder)
    session = open_session(folder, *overrides)
    with pytest.raises(RunError, match=told):
        run_recipe(session.recipe, console=Console(quiet=True))
    assert not (session.root / "transfer").exists()
    if "hidden_weight" not in told:  # nor is it written to
        with pytest.raises(RunError, match=told):
            cache_teacher(*parts(session))
    assert shards(folder) == before


@pytest.mark.parametrize(
    "override, told",
    [
        ("cache_teacher.k=3", r"another k \(64, not 3\)"),
        ("cache_teacher.hidden=true", r"another hidden \(False, not True\)"),
        ("cache_teacher.dtype=float32", "another dtype"),
    ],
)
def test_a_cache_is_not_mixed(plain, write, folder, override, told):
    shutil.copytree(plain, folder)
    with pytest.raises(RunError, match=told):
        write(override)


def test_more_tokens_than_there_are(write):
    with pytest.raises(RunError, match="cache_teacher.k is 300; the teacher's vocabulary has 259 tokens"):
        write("cache_teacher.k=300")


def test_a_folder_of_something_else_is_left_alone(write, folder):
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no teacher cache, its index.json is not there"):
        write()
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "index.json").write_text("{")
    with pytest.raises(RunError, match="its index.json is damaged"):
        write()


# Interruptions and damage

SHARDED = [
    "cache_teacher.shard_mb=1",
    "cache_teacher.k=259",
    "cache_teacher.dtype=float32",
    "cache_teacher.hidden=true",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What is in a cache written in one go: 3 shards."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "cache"
    cache_teacher(*parts(open_session(folder, *SHARDED)))
    assert len(shards(folder)) == 3
    return contents(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("where, stop_in", [("_targets", 0), ("_targets", 2), ("_write", 1), ("write_json", 1)])
def test_an_interrupted_cache_goes_on_with_the_next_shard(write, folder, monkeypatch, uninterrupted, stop_in, where):
    original, calls = getattr(teacher_cache, where), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop_in + 1 + (where == "write_json"):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(teacher_cache, where, stop)
    with pytest.raises(KeyboardInterrupt):
        write(*SHARDED)
    kept = json.loads((folder / "index.json").read_text())["shards"]
    assert len(kept) == stop_in
    monkeypatch.setattr(teacher_cache, where, original)
    made = []
    monkeypatch.setattr(teacher_cache, "_write", lambda *args: made.append(1) or write_shard(*args))
    write(*SHARDED)
    assert len(made) == 3 - stop_in
    assert contents(folder) == uninterrupted


write_shard = teacher_cache._write


def test_a_kill_loses_nothing_that_was_written(folder, uninterrupted):
    arguments = ["cache-teacher", str(TINY), *SMALL, *SHARDED, "run.precision=fp32"]
    arguments += [f"run.dir={folder.parent / 'run'}", f"distill.teacher_cache={folder}"]

    def run():
        original, calls = teacher_cache._targets, []

        def kill(*args):
            calls.append(1)
            return os.kill(os.getpid(), signal.SIGKILL) if len(calls) == 2 else original(*args)

        teacher_cache._targets = kill
        main(arguments)

    assert in_one(run) == -signal.SIGKILL and list(shards(folder)) == ["shard-00000.safetensors"]
    session = open_session(folder, *SHARDED)
    cache_teacher(*parts(session))
    assert contents(folder) == uninterrupted


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is not what was written"),
        (lambda path: path.write_bytes(b""), "is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\xff" + path.read_bytes()[-8:]), "is not what was"),
        (lambda path: path.unlink(), "cannot be read .No such file or directory."),
    ],
    ids=["truncated", "empty", "flipped", "gone"],
)
def test_a_damaged_shard_is_named_and_made_anew(write, folder, uninterrupted, harm, told):
    session = open_session(folder, *SHARDED)
    folder.mkdir()
    for name, content in uninterrupted.items():
        (folder / name).write_bytes(content)
    path = folder / "shard-00001.safetensors"
    harm(path)
    with pytest.raises(
        RunError, match=f"shard-00001.safetensors {told}.*: `transpoint cache-teacher CONFIG` makes it anew"
    ):
        CachedTargets(session.train_data, folder)
    _, said = write(*SHARDED)
    assert f"{path} " in said and "it is made anew" in said
    assert contents(folder) == uninterrupted


def test_a_full_disk_is_said_and_what_was_written_stays(write, folder, monkeypatch, uninterrupted):
    original, calls = save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) == 2:
            original({"some": torch.zeros(10)}, path)
            raise OSError(28, "No space left on device")
        return original(tensors, path)

    monkeypatch.setattr(teacher_cache, "save_file", full)
    with pytest.raises(
        RunError, match="shard-00001.safetensors could not be written .*free some space, then run the same"
    ):
        write(*SHARDED)
    assert [path.name for path in sorted(folder.iterdir())] == ["index.json", "shard-00000.safetensors"]
    monkeypatch.setattr(teacher_cache, "save_file", original)
    write(*SHARDED)
    assert contents(folder) == uninterrupted


def test_too_little_space_is_said_before_anything_is_computed(write, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parent)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match="has 0 MB free, and the cache takes 2 MB more: lower cache_teacher.k"):
        write(*SHARDED)
    assert not shards(folder)


def test_predictions_that_are_not_finite_are_refused(folder):
    session = open_session(folder)
    with torch.no_grad():
        session.teacher.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(RunError, match="the teacher's logprobs on the sequences 0, 1, 2, 3 are not finite"):
        cache_teacher(*parts(session))
    assert not shards(folder)


# The command


def test_the_command_says_what_truncation_costs(folder, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"COLUMNS": "300"})
    arguments = ["cache-teacher", str(TINY), *SMALL, f"run.dir={folder.parent / 'run'}"]
    assert main([*arguments, f"distill.teacher_cache={folder}", "cache_teacher.k=16"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{folder}: 43 sequences, the 16 most likely of 259 tokens each; the rest has ")
    assert line.endswith(" nats a token")
    assert main(arguments) == 1
    assert "distill.teacher_cache is null: set it to the folder" in capsys.readouterr().err
