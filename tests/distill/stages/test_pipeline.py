"""A recipe through every stage: what a run leaves, what is reused and what runs again, interrupted anywhere."""

import dataclasses
import io
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from run_files import STAGES, TINY, done, metrics, student
from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.data.sources import DataError
from transpoint.distill.errors import RunError
from transpoint.distill.models import load_model
from transpoint.distill.report.summary import card_facts, summary
from transpoint.distill.run.files import read_json, write_json
from transpoint.distill.run.folder import StageFolder
from transpoint.distill.run.identity import identity
from transpoint.distill.stages import session as session_module
from transpoint.distill.stages.inputs import lineage, stage_inputs
from transpoint.distill.stages.pipeline import names
from transpoint.distill.stages.runner import run_recipe
from transpoint.distill.stages.session import Session
from transpoint.teachers import TeacherError
from transpoint.teachers.random import random_teacher

SAMPLE = TINY.parent / "sample"
pytestmark = pytest.mark.usefixtures("unverified")


def files(folder):
    """Every file with the time it was written, but the copy of the recipe, which each run leaves anew."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "recipe.yaml"}


def reasons(folder, *overrides, path=TINY):
    """{stage: why it would run}, of the stages that would."""
    needs = stage_inputs(load_recipe(path, [f"run.dir={folder}", *overrides]))
    found = {stage: StageFolder(folder, stage).why_not_reusable(needs[stage]) for stage in STAGES}
    return {stage: reason for stage, reason in found.items() if reason}


def ran(output):
    """The stages that ran, and why, as printed."""
    lines = [line.split(": ", 1) for line in output.splitlines() if ": " in line]
    starts = ("not run yet", "changed: ", "interrupted", "asked for by ")
    return {stage: reason for stage, reason in lines if stage in STAGES and reason.startswith(starts)}


# What a run leaves


def test_a_run_leaves_a_folder_for_each_stage(tiny_run):
    recipe = load_recipe(TINY, [f"run.dir={tiny_run}"])
    assert load_recipe(tiny_run / "recipe.yaml") == recipe
    needs = stage_inputs(recipe)
    for stage in STAGES:
        assert StageFolder(tiny_run, stage).started == json.loads(json.dumps(needs[stage]))
        record = done(tiny_run, stage)
        assert record["finished"].startswith("20") and record["stage_seconds"] > 0
    for stage in ("transfer", "calibrate", "align", "distill"):
        assert type(load_model(tiny_run / stage / "student")).__name__ == "HybridForCausalLM"
        assert not (tiny_run / stage / "checkpoints").exists()
    assert done(tiny_run, "transfer")["mixers"] == ["mamba2", "attention", "mamba2", "attention"]
    plan = (tiny_run / "transfer" / "transfer_plan.txt").read_text()
    assert "model.layers.0.self_attn.in_proj.weight" in plan and "model.layers.2.self_attn.q_proj.weight" in plan
    assert sorted(done(tiny_run, "calibrate")["layers"]) == ["layer_0", "layer_2"]
    verified = done(tiny_run, "export")["verified"]
    assert done(tiny_run, "export")["folder"] == "native"
    assert 0 < verified["logits"] < 1e-4 * verified["scale"] and 0 < verified["decode"] < 1e-4 * verified["scale"]
    assert type(AutoModelForCausalLM.from_pretrained(tiny_run / "export" / "native")).__name__ == (
        "GraniteMoeHybridForCausalLM"
    )
    left = {path.suffix for path in tiny_run.rglob("*") if path.is_file()}
    assert left <= {".json", ".jsonl", ".yaml", ".txt", ".md", ".safetensors", ".jinja", ".lock"}  # nothing pickled
    assert not [path for path in tiny_run.rglob(".*")]  # nothing half-written


def test_the_seconds_of_each_stage_are_known_by_part(tiny_run):
    parts = {
        "transfer": {"building", "verifying", "saving", "measuring"},
        "calibrate": {"loading", "tokenising", "fitting", "saving", "measuring"},
        "align": {"loading", "steps", "saving", "measuring"},
        "distill": {"loading", "steps", "saving", "measuring"},
        "export": {"loading", "measuring", "exporting", "verifying"},
        "evaluate": {"loading", "measuring", "recall", "answers", "cost"},
    }
    for stage, expected in parts.items():
        record = done(tiny_run, stage)
        assert set(record["seconds"]) == expected | {"other"} and record["starts"] == 1
        assert sum(record["seconds"].values()) == pytest.approx(record["stage_seconds"], abs=0.05)
    before = json.loads((tiny_run / "seconds.json").read_text())["seconds"]
    assert set(before) == {"loading", "tokenising", "other"}  # of the teacher, for what evaluate looks at first


def test_training_is_logged_and_trains(tiny_run):
    for stage, figures in (("align", {"layer_0", "layer_2"}), ("distill", {"kl"})):
        lines = metrics(tiny_run, stage)
        assert [line["step"] for line in lines] == [5, 10, 15, 20]
        assert [line["tokens"] for line in lines] == [4 * 64 * step for step in (5, 10, 15, 20)]
        assert set(lines[0]) == {"step", "loss", "gradient_norm", "lr", "tokens"} | figures
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert done(tiny_run, stage)["training"]["tokens"] == 4 * 64 * 20
    kl = {stage: done(tiny_run, stage)["quality"]["kl"] for stage in ("transfer", "calibrate", "align", "distill")}
    assert kl["distill"] < kl["align"] < kl["calibrate"] and kl["align"] < kl["transfer"]
    exported, trained = done(tiny_run, "evaluate")["quality"], done(tiny_run, "distill")["quality"]
    assert exported.pop("measured_on") == trained.pop("measured_on")
    exported, trained = ({k: v for k, v in q.items() if v is not None} for q in (exported, trained))
    assert exported == pytest.approx(trained, rel=1e-4)
    results = json.loads((tiny_run / "evaluate" / "results.json").read_text())
    assert results["quality"] == done(tiny_run, "evaluate")["quality"]
    assert [entry["prompt"] for entry in results["answers"]] == ["What is the capital of France?"]


def test_each_stage_trains_what_it_says(tiny_run):
    """Align the mixers alone; distill here, with a learning rate for them, the teacher's parameters too."""
    teacher = random_teacher("random-llama")[0].state_dict()
    tensors = {
        stage: load_file(tiny_run / stage / "student" / "model.safetensors")
        for stage in ("transfer", "calibrate", "align", "distill")
    }
    for name, value in tensors["align"].items():
        mixer = ".layers.0.self_attn." in name or ".layers.2.self_attn." in name
        assert torch.equal(value, tensors["calibrate"][name]) != mixer, name
        assert not torch.equal(value, tensors["distill"][name]), name
        assert mixer or torch.equal(value, teacher[name]), name


@pytest.mark.parametrize("teacher_lr", [0.0, 1e-3])
def test_the_teachers_parameters_are_frozen_without_a_learning_rate(teacher_lr, tiny_copy, run_tiny):
    overrides = ["distill.steps=2", f"distill.teacher_lr={teacher_lr}"]
    run_tiny(tiny_copy, *overrides, until_stage="distill")
    before, after = (load_file(tiny_copy / stage / "student" / "model.safetensors") for stage in ("align", "distill"))
    for name in before:
        mixer = ".layers.0.self_attn." in name or ".layers.2.self_attn." in name
        assert torch.equal(before[name], after[name]) == (not mixer and teacher_lr == 0), name


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["data.streaming=true", "data.max_train_tokens=null"]])
def test_stages_take_sequences_of_lengths_of_their_own(streaming, tiny_copy, run_tiny):
    more = ["align.steps=3", "align.length=16", "distill.steps=2", "distill.length=96", *streaming]
    said = run_tiny(tiny_copy, *more, until_stage="distill")
    assert "3 steps of 4 x 16 tokens: 192" in said and "2 steps of 4 x 96 tokens: 768" in said
    assert [done(tiny_copy, stage)["training"]["tokens"] for stage in ("align", "distill")] == [192, 768]
    assert done(tiny_copy, "distill")["quality"]["tokens"] == done(tiny_copy, "align")["quality"]["tokens"]


def test_no_steps_are_no_change(tiny_copy, run_tiny):
    run_tiny(tiny_copy, "align.steps=0", until_stage="align")
    assert student(tiny_copy, "align") == student(tiny_copy, "calibrate")
    assert done(tiny_copy, "align")["training"]["tokens"] == 0


def test_what_a_run_prints(tiny_output):
    folder, output = tiny_output
    assert ran(output) == dict.fromkeys(STAGES, "not run yet")
    for stage in ("transfer", "calibrate", "align", "distill", "evaluate"):
        kl = done(folder, stage)["quality"]["kl"]
        assert f"{stage}: held-out KL {kl:.4f}, perplexity " in output
    assert "train text: 2 documents, 20,000 tokens" in output and "heldout text: 1 documents, 2,000 tokens" in output
    assert f"export: {folder}/export/native loads without Transpoint; logits differ by " in output


# What is reused


def test_a_second_run_does_nothing(tiny_copy, run_tiny, monkeypatch):
    monkeypatch.setattr(session_module, "teacher_of", lambda *args: pytest.fail("the teacher was loaded"))
    before, recipe = files(tiny_copy), (tiny_copy / "recipe.yaml").read_text()
    recipe = recipe.replace(recipe.split("dir: ")[1].split("\n")[0], str(tiny_copy))
    assert run_tiny(tiny_copy).endswith("".join(f"{stage}: done before, reused\n" for stage in STAGES))
    assert files(tiny_copy) == before and (tiny_copy / "recipe.yaml").read_text() == recipe


SETTINGS = {
    "teacher.source=random-mistral": "transfer",
    "student.keep_attention=[1]": "transfer",
    "student.conv_kernel=2": "transfer",
    "calibrate.sequences=3": "calibrate",
    "data.length=32": "calibrate",
    "data.max_train_tokens=10000": "calibrate",
    "align.steps=21": "align",
    "align.lr=0.1": "align",
    "align.betas=[0.9, 0.99]": "align",
    "data.bos=false": "calibrate",
    "student.conv_kernel=3": "transfer",
    "run.seed=1": "align",
    "run.precision=fp32": "align",
    "distill.temperature=2": "distill",
    "distill.teacher_lr=0": "distill",
    "export.dtype=bfloat16": "export",
    "export.format=custom": "export",
    "evaluate.sequences=2": "evaluate",
    "evaluate.prompts=[Why]": "evaluate",
    "data.max_heldout_tokens=1000": "evaluate",
}


@pytest.mark.parametrize("override", SETTINGS)
def test_a_changed_setting_reruns_its_stage_and_what_follows(override, tiny_run):
    found = reasons(tiny_run, override)
    first = STAGES.index(SETTINGS[override])
    assert list(found) == list(STAGES[first:])
    assert found[STAGES[first]].startswith("changed: ") and f"{override.partition('=')[0]} (" in found[STAGES[first]]
    for before, stage in zip(STAGES[first:], STAGES[first + 1 :], strict=False):
        assert f"what {before} made" in found[stage]


@pytest.mark.parametrize(
    "override",
    [
        "run.device=cpu",
        "align.log_every=7",
        "align.checkpoint_every=3",
        "distill.keep_checkpoints=9",
        "align.micro_batch_size=2",
        "distill.gradient_checkpointing=true",
        "run.trackers=[tensorboard]",
        "run.reuse=[/nowhere]",
        "student.keep_attention='every:2'",
        "student.trans_points=7",
        "teacher.share=true",
        "data.cache=/nowhere",
        "run.dir=/elsewhere",
    ],
)
def test_what_changes_no_result_reruns_nothing(override, tiny_run):
    assert reasons(tiny_run, override) == {}


def as_before(needs, after=None):
    """What a stage depended on, as an earlier version wrote it."""
    needs = json.loads(json.dumps(needs))
    for stage in ("align", "distill"):
        if stage in needs:
            needs[stage] |= {"log_every": 5, "max_skipped": 10, "micro_batch_size": None, "checkpoint_every": 10}
            needs[stage] |= {"keep_checkpoints": 2}
    if "data" in needs:
        del needs["data"]["bos"]
    if "student" in needs:
        needs["student"] |= {"keep_attention": None, "trans_points": "paper-v9", "conv_activation": "auto"}
        needs["student"]["keep_attention"] = "every:2"
    return needs | ({} if after is None else {"after": after})


def test_a_run_of_an_earlier_version_is_reused(tiny_copy):
    after = None
    for stage in STAGES:
        folder = StageFolder(tiny_copy, stage)
        write_json(folder / "stage.json", as_before(folder.started, after))
        after = {stage: identity(read_json(folder / "stage.json"))}
    assert reasons(tiny_copy) == {} and list(lineage(tiny_copy)) == list(STAGES)
    assert list(reasons(tiny_copy, "distill.temperature=2")) == ["distill", "export", "evaluate"]
    assert list(reasons(tiny_copy, "student.gate=false")) == list(STAGES)
    changed = read_json(tiny_copy / "calibrate" / "stage.json") | {"code": 9}
    write_json(tiny_copy / "calibrate" / "stage.json", changed)  # what came after it came of something else
    assert list(reasons(tiny_copy)) == list(STAGES[1:])


def test_files_of_a_teacher_that_no_loading_reads_rerun_nothing(tmp_path):
    folder, run = tmp_path / "teacher", tmp_path / "run"
    model, tokenizer = random_teacher("random-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("one")
    overrides = [f"teacher.source={folder}"]
    needs = stage_inputs(load_recipe(TINY, overrides))
    StageFolder(run, "transfer").begin(needs["transfer"])
    StageFolder(run, "transfer").finish({})

    def changed(at=folder):
        now = stage_inputs(load_recipe(TINY, [f"teacher.source={at}"]))
        return StageFolder(run, "transfer").why_not_reusable(now["transfer"])

    (folder / "README.md").write_text("two")
    (folder / "picture.png").write_bytes(b"x")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert changed() is None
    assert changed(shutil.copytree(folder, tmp_path / "moved")) is None
    old = json.loads(json.dumps(needs["transfer"]))  # with all files, and where they were
    old["teacher"] |= {"source": "some/where", "files": [["README.md", "1"], *old["teacher"]["files"]]}
    write_json(run / "transfer" / "stage.json", old)
    assert changed() is None
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        path = tmp_path / "moved" / name
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        assert "teacher.files" in changed(tmp_path / "moved"), name
        path.write_bytes(kept)


def test_a_changed_text_reruns_what_reads_it(tiny_run, tmp_path):
    for name in ("train", "heldout"):
        shutil.copy(SAMPLE / f"{name}.jsonl.zst", tmp_path / f"{name}.jsonl.zst")
    overrides = [f"data.{name}=[{tmp_path / name}.jsonl.zst]" for name in ("train", "heldout")]
    assert reasons(tiny_run, *overrides) == {}  # the same text elsewhere
    (tmp_path / "train.jsonl.zst").write_bytes((SAMPLE / "heldout.jsonl.zst").read_bytes())
    found = reasons(tiny_run, *overrides)
    assert list(found) == ["calibrate", "align", "distill", "export", "evaluate"]
    assert found["calibrate"].startswith("changed: data.train (")
    (tmp_path / "train.jsonl.zst").write_bytes((SAMPLE / "train.jsonl.zst").read_bytes())
    (tmp_path / "heldout.jsonl.zst").write_bytes((SAMPLE / "train.jsonl.zst").read_bytes())
    found = reasons(tiny_run, *overrides)
    assert list(found) == ["evaluate"] and found["evaluate"].startswith("changed: data.heldout (")


def test_a_changed_teacher_folder_reruns_everything(tmp_path):
    folder, run = tmp_path / "teacher", tmp_path / "run"
    random_teacher("random-llama")[0].save_pretrained(folder)
    overrides = [f"teacher.source={folder}"]
    needs = stage_inputs(load_recipe(TINY, overrides))
    for stage in STAGES:
        StageFolder(run, stage).begin(needs[stage])
        StageFolder(run, stage).finish({})
    assert reasons(run, *overrides) == {}
    random_teacher("random-llama", seed=1)[0].save_pretrained(folder)
    assert list(reasons(run, *overrides)) == list(STAGES)


@pytest.mark.slow
def test_a_longer_align_runs_from_there_and_says_why(tiny_copy, run_tiny):
    before = {stage: student(tiny_copy, stage) for stage in ("transfer", "calibrate", "align", "distill")}
    output = run_tiny(tiny_copy, "align.steps=25", until_stage="distill")
    assert list(ran(output)) == ["align", "distill"] and "align: changed: align.steps (20 -> 25)" in output
    assert list(reasons(tiny_copy, "align.steps=25")) == ["export", "evaluate"]
    for stage in ("transfer", "calibrate"):
        assert f"{stage}: done before, reused" in output and student(tiny_copy, stage) == before[stage]
    for stage in ("align", "distill"):
        assert student(tiny_copy, stage) != before[stage]
    assert [line["step"] for line in metrics(tiny_copy, "align")] == [5, 10, 15, 20, 25]
    needs = stage_inputs(load_recipe(TINY, ["align.steps=25"]))
    assert StageFolder(tiny_copy, "distill").started["after"] == {"align": identity(needs["align"])}
    assert load_recipe(tiny_copy / "recipe.yaml").align.steps == 25


def test_other_held_out_text_measures_every_student_again(tiny_copy, run_tiny):
    before = {stage: done(tiny_copy, stage)["quality"] for stage in STAGES if stage != "export"}
    assert len({quality["measured_on"] for quality in before.values()}) == 1
    weights = student(tiny_copy, "distill")
    output = run_tiny(tiny_copy, "evaluate.sequences=3")
    assert list(ran(output)) == ["evaluate"] and student(tiny_copy, "distill") == weights
    after = {stage: done(tiny_copy, stage)["quality"] for stage in before}
    assert len({quality["measured_on"] for quality in after.values()}) == 1
    for stage in before:
        assert after[stage]["measured_on"] != before[stage]["measured_on"]
        assert after[stage]["tokens"] < before[stage]["tokens"] and after[stage]["kl"] != before[stage]["kl"]


@pytest.mark.slow
def test_from_and_until(tiny_copy, run_tiny, tmp_path):
    before = files(tiny_copy), student(tiny_copy, "distill")
    output = run_tiny(tiny_copy, from_stage="distill", until_stage="distill")
    assert ran(output) == {"distill": "asked for by --from distill"} and "export" not in output
    assert student(tiny_copy, "distill") == before[1]  # and the same comes out
    changed = {
        path.relative_to(tiny_copy).parts[0] for path, time in files(tiny_copy).items() if before[0].get(path) != time
    }
    assert changed == {"distill", "seconds.json"}
    assert ran(run_tiny(tiny_copy)) == {}
    assert list(ran(run_tiny(tmp_path / "new", until_stage="transfer"))) == ["transfer"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir() if p.name in STAGES) == ["transfer"]
    assert reasons(tmp_path / "new") == dict.fromkeys(STAGES[1:], "not run yet")


# Interrupted


@pytest.mark.slow
def test_the_same_recipe_in_another_folder_exports_the_same_bytes(tiny_run, run_tiny, tmp_path):
    run_tiny(tmp_path / "again", until_stage="export")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tiny_run / "export" / "native", tmp_path / "again" / "export" / "native")
    )
    assert first.keys() == second.keys() and Path("model.safetensors") in first
    differing = {str(name) for name in first if first[name] != second[name]}
    assert differing <= {"README.md"}  # the card names what was measured, and the first run went on to evaluate


@pytest.mark.slow
def test_interrupted_in_every_training_and_resumed_equals_uninterrupted(tiny_run, tiny_copy, run_tiny):
    for stage in ("align", "distill", "export", "evaluate"):
        shutil.rmtree(tiny_copy / stage)
    # Steps are counted over all stages of one start. After a checkpoint, before the first, at one, in the last step.
    ten = ["step-00000010"]
    for stage, stop, kept in (("align", 13, ten), ("distill", 10 + 7, []), ("distill", 10, ten), ("distill", 10, ten)):
        steps = []

        def on_step(step, steps=steps, stop=stop):
            steps.append(step)
            if len(steps) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_tiny(tiny_copy, on_step=on_step)
        assert [path.name for path in (tiny_copy / stage / "checkpoints").glob("*")] == kept
        assert not (tiny_copy / stage / "done.json").exists()
        assert reasons(tiny_copy)[stage] == "interrupted"
    output = run_tiny(tiny_copy)
    assert ran(output) == {"distill": "interrupted", "export": "not run yet", "evaluate": "not run yet"}
    assert "distill: going on from step 10" in output
    for stage, starts in (("align", 2), ("distill", 4)):
        assert student(tiny_copy, stage) == student(tiny_run, stage)
        assert metrics(tiny_copy, stage) == metrics(tiny_run, stage)
        assert done(tiny_copy, stage)["starts"] == starts
    weights = "export/native/model.safetensors"
    assert (tiny_copy / weights).read_bytes() == (tiny_run / weights).read_bytes()
    found, wanted = (json.loads((run / "evaluate" / "results.json").read_text()) for run in (tiny_copy, tiny_run))
    for measures in (*found["measures"].values(), *wanted["measures"].values()):
        assert len(measures.pop("costs")) == 1  # times
    assert found == wanted


@pytest.mark.parametrize("stage", ["transfer", "calibrate", pytest.param("align", marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_between_steps_the_stage_runs_again(stage, when, tiny_run, tiny_copy, run_tiny, pipeline):
    """Before it made anything, or after everything but its record."""
    shutil.rmtree(tiny_copy / stage)
    index = names().index(stage)
    real = pipeline[index]

    def interrupted(session, folder):
        if when == "after":
            real.run(session, folder)
        raise KeyboardInterrupt

    pipeline[index] = dataclasses.replace(real, run=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tiny_copy)
    pipeline[index] = real
    assert reasons(tiny_copy) == {stage: "interrupted"}
    kept = json.loads((tiny_copy / stage / "seconds.json").read_text())
    assert ran(run_tiny(tiny_copy)) == {stage: "interrupted"}
    record = done(tiny_copy, stage)
    assert record["starts"] == 2 and not (tiny_copy / stage / "seconds.json").exists()
    assert all(record["seconds"][part] >= seconds for part, seconds in kept["seconds"].items())
    assert student(tiny_copy, stage) == student(tiny_run, stage)
    if stage == "align":
        assert metrics(tiny_copy, stage) == metrics(tiny_run, stage)


# From one run to another


@pytest.mark.slow
def test_another_run_takes_over_what_is_the_same_and_goes_on(tiny_run, run_tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "run"
    reuse = (f"run.reuse=[{tmp_path / 'gone'}, {tiny_run}]", "distill.lr=2e-3")
    before = files(tiny_run)
    output = run_tiny(folder, *reuse)
    for stage in ("transfer", "calibrate", "align"):
        assert f"{stage}: taken over from {tiny_run}" in output
        assert done(folder, stage) == done(tiny_run, stage) | {"taken_over": str(tiny_run)}
    assert student(folder, "align") == student(tiny_run, "align")
    assert "distill: not run yet" in output and student(folder, "distill") != student(tiny_run, "distill")
    assert files(tiny_run) == before
    assert "taken over" not in run_tiny(folder, *reuse)
    shutil.rmtree(folder / "align")
    main(["status", str(folder)])
    assert f"taken over from {tiny_run}" in capsys.readouterr().out


def test_what_a_stage_does_is_part_of_what_its_result_depends_on(tiny_copy, run_tiny, pipeline):
    index = names().index("export")
    pipeline[index] = dataclasses.replace(pipeline[index], code=99)
    output = ran(run_tiny(tiny_copy))
    assert output.keys() == {"export", "evaluate"} and output["export"] == "changed: code (1 -> 99)"


# What is refused


def refused(kind, *overrides, **options):
    with pytest.raises(kind) as caught:
        run_recipe(load_recipe(TINY, overrides), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_processes_that_do_not_see_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(RunError, f"run.dir={tmp_path / 'run'}") == (
        "2 processes were launched, but they do not see each other (world size 1): each would train alone; check the "
        "launch configuration"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    told = refused(RunError, f"run.dir={tmp_path / 'run'}", "run.device=cuda")
    assert told == "run.device is cuda, but no GPU is to be seen; set run.device=cpu"


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    told = refused(RunError, f"run.dir={tmp_path / 'file' / 'run'}")
    assert told.startswith("the run folder cannot be written: ") and told.endswith("; set run.dir to another place")


def test_errors_of_data_and_teacher_come_in_one_line(tmp_path, monkeypatch):
    run = f"run.dir={tmp_path / 'run'}"
    assert refused(TeacherError, run, "teacher.source=random-lama").startswith(
        "no random teacher 'random-lama'; expected one of random-llama, "
    )
    monkeypatch.setattr(session_module, "teacher_of", lambda *args: pytest.fail("the teacher was loaded"))
    gone = SAMPLE / "tarin.jsonl.zst"
    assert refused(DataError, run, f"data.train=[{gone}]") == (
        f"no such file or folder: {gone}; did you mean {SAMPLE / 'train.jsonl.zst'}?"
    )
    for name in ("train", "heldout"):
        told = refused(DataError, run, f"data.{name}=[]")
        assert told == f"data.{name} is empty: list files, folders or hub:OWNER/NAME there"
    assert refused(DataError, run, f"data.heldout=[{tmp_path}]").startswith(f"folder {tmp_path} holds no file of a ")


def test_a_tokenizer_that_is_not_the_teachers(tmp_path):
    """Refused at once: on a GPU it would be an index out of range in the middle of training."""
    teacher, tokenizer = random_teacher("random-llama")
    rows = teacher.config.vocab_size
    tokenizer.add_tokens(["<another>", "<one more>"])
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    told = refused(RunError, f"run.dir={tmp_path / 'run'}", f"teacher.source={tmp_path / 'teacher'}")
    assert told == (
        f"the tokenizer has a token '<one more>' of number {rows + 1:,}, the teacher's embeddings {rows:,} rows: they "
        "do not belong together; use the tokenizer that the teacher was trained with, or resize its embeddings"
    )
    teacher.resize_token_embeddings(rows + 62)  # padded, as many are
    teacher.save_pretrained(tmp_path / "teacher")
    session = Session(load_recipe(TINY, [f"run.dir={tmp_path / 'run'}", f"teacher.source={tmp_path / 'teacher'}"]))
    assert session.teacher.config.vocab_size == rows + 62


def test_too_little_text(tmp_path):
    told = refused(DataError, f"run.dir={tmp_path / 'run'}", "data.max_heldout_tokens=50")
    assert told == ("the text has 50 tokens, less than one sequence of 64: set a shorter length or give more text")


# The summary


def test_the_summary_shows_plan_quality_answers_and_how_to_load(tiny_run):
    parts = summary(tiny_run)
    text = "\n".join(part for part in parts if isinstance(part, str))
    assert "layer plan: MAMA  (2 of 4 layers are Mamba-2)" in text
    assert "question: What is the capital of France?\n teacher: " in text
    assert f"checkpoint: {tiny_run / 'export' / 'native'}" in text
    out = io.StringIO()
    Console(file=out, width=80).print(*(part for part in parts if not isinstance(part, str)))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["start", *STAGES, "all", "share"] in lines
    assert {"steps", "all"} < {line[0] for line in lines if line and line[-1].endswith("%")}
    names = {}
    exec(text[text.index("from transformers import") :], names)
    assert type(names["model"]).__name__ == "GraniteMoeHybridForCausalLM"


def test_summary_and_card_read_a_runs_records_once(tiny_run, monkeypatch):
    read = []
    real = StageFolder.done
    monkeypatch.setattr(StageFolder, "done", property(lambda self: read.append(self.stage) or real.fget(self)))
    for one in (summary, card_facts):
        read.clear()
        one(tiny_run)
        assert read == STAGES


def test_the_card_of_a_run(tiny_run):
    text = (tiny_run / "export" / "native" / "README.md").read_text(encoding="utf-8")
    for stage in ("transfer", "calibrate", "align", "distill"):
        quality = done(tiny_run, stage)["quality"]
        row = f"| after {stage} | {quality['perplexity']:.2f} | {quality['bits_per_byte']:.4f} | {quality['kl']:.4f} |"
        assert row in text
    assert "random-llama" in text and "`MAMA`" in text and "- align: 5,120 tokens" in text
    assert str(tiny_run) not in text and str(SAMPLE) not in text and str(Path.home()) + "/" not in text


# What must not happen


def test_stages_of_other_settings_do_not_count(tiny_copy, run_tiny):
    run_tiny(tiny_copy, "student.keep_attention=[0]", until_stage="transfer")
    assert list(lineage(tiny_copy)) == ["transfer"] and (tiny_copy / "distill" / "done.json").exists()
    plan, _, _ = summary(tiny_copy)  # with quality and seconds, and no answers, no checkpoint
    assert plan.startswith("layer plan: AMMM")
    assert [row["model"] for row in card_facts(tiny_copy).quality][1:] == ["after transfer"]
    assert card_facts(tiny_copy).recipe["student"]["keep_attention"] == [0]


def test_what_is_not_a_stage_is_not_deleted(tmp_path, run_tiny):
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something else than a stage: set run.dir to another place"):
        run_tiny(tmp_path, until_stage="transfer")
    assert (tmp_path / "transfer" / "mine.txt").read_text() == "mine"


def test_a_start_that_was_killed_while_it_wrote_its_first_record(tmp_path, run_tiny):
    (tmp_path / "transfer").mkdir()
    (tmp_path / "transfer" / ".stage.json.x1y2").write_text("{")
    run_tiny(tmp_path, until_stage="transfer")
    assert done(tmp_path, "transfer") and not (tmp_path / "transfer" / ".stage.json.x1y2").exists()


def test_an_impossible_export_is_refused_before_anything_runs(tmp_path, run_tiny):
    with pytest.raises(RunError, match=r"export.format=native cannot hold this student: .*student.rope"):
        run_tiny(tmp_path / "run", "student.rope=true")
    with pytest.raises(RunError, match="it holds weights in float32, float16, bfloat16, not in q8_0"):
        run_tiny(tmp_path / "run", "export.dtype=q8_0")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="it holds what llama, mistral, .*granitemoeshared have, not qwen3"):
        run_tiny(tmp_path / "run", "teacher.source=random-qwen3")
    with pytest.raises(RunError, match="its attention norms queries and keys, which that of a llama does not"):
        run_tiny(tmp_path / "run", "student.mixer=gdn")
    assert not (tmp_path / "run" / "calibrate").exists()
    run_tiny(tmp_path / "run", "student.rope=true", until_stage="transfer")  # nothing is to be exported


def test_until_before_from(tmp_path, run_tiny):
    with pytest.raises(RunError, match="--from distill comes after --until align: nothing would run"):
        run_tiny(tmp_path / "run", from_stage="distill", until_stage="align")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bfloat16_teacher_has_a_float32_student(precision, tmp_path, run_tiny):
    steps = ("align.steps=2", "distill.steps=2", f"run.precision={precision}")
    run_tiny(tmp_path / "run", "teacher.dtype=bfloat16", *steps, until_stage="distill")
    weights = load_file(tmp_path / "run" / "distill" / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_a_teacher_in_another_precision_while_a_stage_trains(room, tiny_copy, run_tiny, monkeypatch):
    """It is transferred and measured as it was loaded; the teacher of training is recognisably rounded."""
    exact, loaded = metrics(tiny_copy, "align"), []
    load, measure = session_module.teacher_of, Session.measure

    def remembered(*args):
        model, tokenizer = load(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def measured(session, *args):
        assert room or len(loaded) < 2 or loaded[0]() is None  # of the one that was rounded nothing is left
        assert session.teacher.dtype == torch.float32
        return measure(session, *args)

    monkeypatch.setattr(session_module, "teacher_of", remembered)
    monkeypatch.setattr(Session, "measure", measured)
    if not room:  # for two of them in the CPU's memory
        monkeypatch.setattr(session_module, "free_memory", lambda: 0)
    output = run_tiny(tiny_copy, "teacher.training_dtype=float16", until_stage="align")
    assert len(loaded) == (1 if room else 2)
    assert "transfer: done before, reused" in output and "calibrate: done before, reused" in output
    losses, rounded = ([line["loss"] for line in lines] for lines in (exact, metrics(tiny_copy, "align")))
    assert losses != rounded and rounded == pytest.approx(losses, rel=5e-2)
    quality = json.loads((tiny_copy / "teacher_quality.json").read_text())
    assert quality["kl"] == 0 and quality["same_top"] == 1
