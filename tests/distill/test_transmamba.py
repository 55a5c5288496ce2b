"""TransMamba students through the pipeline: annealed, drawn, resumed, measured at each schedule, shown."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from forked import run_all
from run_files import CONFIGS, done, metrics, student
from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError, load_recipe
from transpoint.distill.models import load_model
from transpoint.distill.report.summary import schedule_table, summary
from transpoint.distill.run.records import ScheduleRecord, read_record
from transpoint.distill.stages.session import Session
from transpoint.students import StudentError

CONFIG = CONFIGS / "tiny-transmamba.yaml"
OWN = [0, 8, 16, 32]
pytestmark = pytest.mark.usefixtures("unverified")


@pytest.fixture(scope="module")
def whole(run_tiny, tmp_path_factory):
    """(run folder, what the run printed), annealed and drawn at once. Only to be read."""
    folder = tmp_path_factory.mktemp("transmamba") / "run"
    overrides = ("distill.sample_schedules=[uniform:16, mamba]", "distill.log_every=1")
    return folder, run_tiny(folder, *overrides, config=CONFIG)


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


# What a run leaves


def test_every_stage_leaves_the_student_at_its_own_schedule(whole):
    for stage in ("transfer", "calibrate", "align", "distill"):
        model = load_model(whole[0] / stage / "student")
        assert model.trans_points == OWN and model.config.trans_points == OWN
    assert load_model(whole[0] / "export" / "custom").trans_points == OWN


def test_align_serves_both_forms(whole):
    lines = metrics(whole[0], "align")
    for layer in range(4):
        assert lines[-1][f"layer_{layer}"] < lines[0][f"layer_{layer}"]
        assert lines[-1][f"attention_{layer}"] < 0.2


def test_distillation_falls_from_attention_to_the_schedules(whole):
    shares = [line["attention"] for line in metrics(whole[0], "distill")]
    assert shares[0] == 1 and shares[1] > 0.75
    # At the end, the share at each of the schedules; where documents begin within a sequence it is a little more.
    at = [(0 + 8 + 16 + 32) / 4 / 64, 16 / 64, 0]
    assert all(any(one <= share < one + 0.02 for one in at) for share in shares[10:])
    assert {max(one for one in at if one <= share) for share in shares[10:]} == {*at}


@pytest.mark.slow
def test_without_align_distillation_begins_at_the_teacher(run_tiny, tmp_path):
    overrides = ("align.steps=0", "distill.steps=8", "distill.log_every=1", "run.precision=fp32")
    run_tiny(tmp_path / "run", *overrides, config=CONFIG, until_stage="distill")
    kl = [line["kl"] for line in metrics(tmp_path / "run", "distill")]
    assert kl[0] < 1e-6 and all(value > 1e-3 for value in kl[4:])


def test_the_schedules_it_was_trained_on_are_recorded(whole):
    trained = {"[0, 8, 16, 32]": OWN, "uniform:16": [16] * 4, "mamba": [0] * 4}
    assert done(whole[0], "distill")["trained_schedules"] == trained
    records = json.loads((whole[0] / "evaluate" / "results.json").read_text())["schedules"]
    assert [(r["schedule"], r["trained"]) for r in records] == [
        ("[0, 8, 16, 32]", True),
        ("uniform:16", True),
        ("mamba", True),
        ("teacher", False),
    ]
    assert [r["trans_points"] for r in records] == [*trained.values(), ["inf"] * 4]
    for place in ("distill/student", "export/custom"):
        config = json.loads((whole[0] / place / "config.json").read_text())
        assert config["measured_trans_points"] == records and config["trans_points"] == OWN


def test_what_was_measured_of_a_student_is_not_said_of_the_one_tuned_from_it(copy, run_tiny, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "a" * 200, "completion": "b" * 200}))
    tune = ("tune.steps=1", "tune.batch_size=1", f"tune.train=[{chats}]")
    overrides = ("distill.sample_schedules=[uniform:16, mamba]", "distill.log_every=1", *tune)
    assert "distill: done before" in run_tiny(copy, *overrides, config=CONFIG, until_stage="export")
    for place in ("tune/student", "export/custom"):
        records = json.loads((copy / place / "config.json").read_text())["measured_trans_points"]
        assert [(r["schedule"], r["trained"]) for r in records] == [
            ("[0, 8, 16, 32]", True),
            ("uniform:16", True),
            ("mamba", True),
        ]
        assert all(r["quality"] is None and r["cost"] is None for r in records)


def test_quality_and_cost_of_each_schedule(whole):
    """As measured by hand, on the exported checkpoint."""
    results = json.loads((whole[0] / "evaluate" / "results.json").read_text())
    assert results["quality"].items() >= results["schedules"][0]["quality"].items()
    session = Session(load_recipe(whole[0] / "recipe.yaml"))
    for record in results["schedules"]:
        model = load_model(whole[0] / "export" / "custom")
        model.set_trans_points(record["trans_points"], warn=False)
        assert record["quality"]["kl"] == pytest.approx(session.held_out.measure(model).kl, rel=1e-4)
        points = [float(point) for point in record["trans_points"]]
        assert record["cost"]["attention"] == sum(min(point, 64) for point in points) / 4 / 64
        assert record["cost"]["length"] == 64 and record["cost"]["decode_seconds"] > 0
    held = {record["schedule"]: record["cost"]["cache_bytes"] for record in results["schedules"]}
    assert held["teacher"] == 4 * 64 * 2 * 2 * 16 * 4
    assert held["mamba"] == held["uniform:16"] == held["[0, 8, 16, 32]"] == 4 * 4 * 16 * 16 * 4
    assert len({round(record["quality"]["kl"], 6) for record in results["schedules"]}) == 4


def test_card_and_summary_show_the_schedules(whole):
    folder, output = whole
    text = (folder / "export" / "custom" / "README.md").read_text(encoding="utf-8")
    records = json.loads((folder / "evaluate" / "results.json").read_text())["schedules"]
    for record in records:
        name, trained = record["schedule"], "yes" if record["trained"] else "no"
        kl, late_kl, perplexity = (record["quality"][key] for key in ("kl", "late_kl", "perplexity"))
        assert record["quality"]["late"] == 32 and late_kl != kl
        assert f"| {name} | {trained} | {kl:.4f} | {late_kl:.4f} | {perplexity:.2f} |" in text
        assert f"evaluate at {name}: held-out KL {record['quality']['kl']:.4f}" in output or record is records[0]
    assert "# A TransMamba hybrid of random-llama" in text and "`TTTT`" in text and "`0 8 16 32`" in text
    assert "- transmamba" in text and "mamba2" not in text and str(folder) not in text
    plan, _, _, schedules = summary(folder)[:4]
    assert plan == "layer plan: TTTT  (4 of 4 layers are TransMamba)"
    assert list(schedules.columns[0].cells) == [record["schedule"] for record in records]


def test_a_long_schedule_is_written_below_its_table(whole):
    records = json.loads((whole[0] / "evaluate" / "results.json").read_text())["schedules"]
    records[1]["schedule"] = "[0, 128, 256, 512, 1024, 2048] cycled"
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(schedule_table([read_record(ScheduleRecord, record) for record in records]))
    text = console.export_text()
    assert "(1) [0, 128, 256, 512, 1024, 2048] cycled" in text and "│ (1)" in text


@pytest.mark.slow
def test_held_out_documents_that_never_pass_a_transpoint_are_named(whole, copy, run_tiny):
    assert "never passed" not in whole[1]
    output = run_tiny(
        copy,
        "distill.sample_schedules=[uniform:16, mamba]",
        "distill.log_every=1",
        "evaluate.schedules=[uniform:64, [63, 0, 100, 2000], teacher]",
        config=CONFIG,
    )
    assert (
        "evaluate: the longest held-out document has 64 tokens, so TransPoints of 64, 100, 2000 are never passed: "
        "quality says nothing of the state-space form there; raise data.length, or give longer held-out documents\n"
    ) in output
    records = json.loads((copy / "evaluate" / "results.json").read_text())["schedules"]
    assert [r["schedule"] for r in records][3:] == ["uniform:64", "[63, 0, 100, 2000]", "teacher"]
    assert {r["longest"] for r in records} == {64}
    card = (copy / "export" / "custom" / "README.md").read_text(encoding="utf-8")
    assert "The longest held-out document has 64 tokens: quality says nothing of the\nstate-space form" in card
    assert records[3]["quality"]["kl"] == pytest.approx(records[5]["quality"]["kl"], rel=1e-4)


# Interrupted


@pytest.mark.slow
@pytest.mark.parametrize("stop", [7, 13])
def test_interrupted_while_annealing_and_resumed_equals_uninterrupted(stop, whole, copy, run_tiny):
    """Between two checkpoints in the fall, and after it."""
    for stage in ("distill", "export", "evaluate"):
        shutil.rmtree(copy / stage)
    overrides = ("distill.sample_schedules=[uniform:16, mamba]", "distill.log_every=1", "distill.checkpoint_every=4")

    def on_step(step):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(copy, *overrides, config=CONFIG, on_step=on_step)
    output = run_tiny(copy, *overrides, config=CONFIG, until_stage="distill")
    assert "distill: going on from step" in output
    assert student(copy, "distill") == student(whole[0], "distill")
    assert metrics(copy, "distill") == metrics(whole[0], "distill")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, run_tiny):
    """Where documents end before every TransPoint, what only the state-space form has gets no gradient in a step."""
    overrides = ["align.steps=0", "distill.steps=4", "distill.log_every=1", "distill.lr=1e-3"]
    overrides += ["distill.anneal.fraction=null", "distill.sample_schedules=[teacher]", "calibrate.sequences=1"]
    overrides += ["evaluate.sequences=1", "run.device=cpu", "run.precision=fp32"]
    overrides += ["data.max_train_tokens=4000", "data.max_heldout_tokens=500"]
    run_tiny(tmp_path / "one", *overrides, config=CONFIG, until_stage="distill")
    arguments = ["run", CONFIG, f"run.dir={tmp_path / 'two'}", *overrides, "--until", "distill"]
    (output,) = run_all([{"engine": "ddp", "arguments": arguments, "log": tmp_path / "log"}])
    assert "2 processes (MULTI_CPU) on cpu" in output
    one, two = (metrics(tmp_path / name, "distill") for name in ("one", "two"))
    assert {line["attention"] for line in one} > {1.0}
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


# The command line


def test_plan_shows_transpoints(capsys):
    assert main(["plan", str(CONFIG)]) == 0
    printed = capsys.readouterr().out
    for layer, point in enumerate(OWN):
        assert f"│ {layer}     │ transmamba │ {point:<10} │" in printed
    assert "in transmamba layers that is so past the TransPoint" in printed
    assert main(["plan", str(CONFIG), "student.keep_attention=[1]"]) == 0
    assert "│ 1     │ attention  │ inf        │" in capsys.readouterr().out


def test_eval_and_generate_at_another_schedule(whole, capsys):
    folder = whole[0]
    records = json.loads((folder / "evaluate" / "results.json").read_text())["schedules"]
    for spec, record in (("mamba", records[2]), ("inf", records[3])):
        assert main(["eval", str(folder), "--teacher", "random-llama", "--trans-points", spec]) == 0
        captured = capsys.readouterr()
        assert f"{record['quality']['kl']:.4f}" in captured.out
        warned = captured.err.startswith("transpoint: warning: this student was not trained on TransPoints inf in ")
        assert warned == (not record["trained"]) == (f"kl {record['quality']['kl']:.4g}" in captured.err)
    answers = []
    for spec in ("[0, 8, 16, 32]", "teacher"):
        command = ["generate", str(folder / "export" / "custom"), "Why?", "--max-new-tokens", "24"]
        assert main([*command, "--trans-points", spec]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_transpoints_of_what_has_none(tiny_run, capsys):
    assert main(["generate", str(tiny_run), "Why?", "--trans-points", "mamba"]) == 1
    assert "has no TransPoints to set: it has no transmamba layer" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    "override, told",
    [
        ("distill.anneal.fraction=0.5", "distill.anneal.fraction is 0.5"),
        ("distill.sample_schedules=[mamba]", "distill.sample_schedules is ['mamba']"),
        ("evaluate.schedules=[[0, 1]]", "evaluate.schedules is [[0, 1]]"),
    ],
)
def test_settings_that_need_a_transmamba_student(override, told):
    with pytest.raises(ConfigError) as caught:
        load_recipe(CONFIG.with_name("tiny.yaml"), [override])
    assert str(caught.value) == f"{told}; only student.mixer=transmamba has TransPoints to set"


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, "half"])
def test_impossible_fractions(fraction):
    with pytest.raises(ConfigError, match=f"distill.anneal.fraction is '?{fraction}.*; expected "):
        load_recipe(CONFIG, [f"distill.anneal.fraction={fraction}"])
    with pytest.raises(ConfigError, match="distill.anneal.shape is 'cosine'; expected one of linear, log"):
        load_recipe(CONFIG, ["distill.anneal.shape=cosine"])


def test_infinity_as_yaml_writes_it(tmp_path, run_tiny):
    overrides = ["student.trans_points=[0, .inf, 16, .inf]", "distill.sample_schedules=[.inf]"]
    recipe = load_recipe(CONFIG, overrides)
    assert recipe.student.trans_points == [0, math.inf, 16, math.inf]
    assert recipe.distill.sample_schedules == [math.inf]
    assert load_recipe(CONFIG, ["student.trans_points=.inf"]).student.trans_points == math.inf
    for output in ("transfer: not run yet", "transfer: done before, reused"):
        assert output in run_tiny(tmp_path / "run", *overrides, config=CONFIG, until_stage="transfer")
    assert load_model(tmp_path / "run" / "transfer" / "student").trans_points == [0, math.inf, 16, math.inf]
    assert main(["status", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("key", ["distill.sample_schedules", "evaluate.schedules"])
def test_null_is_no_schedule(key, tmp_path, run_tiny):
    with pytest.raises(StudentError, match=f"^{key}: trans_points is None; expected a number of tokens, ") as caught:
        run_tiny(tmp_path / "run", f"{key}=[mamba, null]", config=CONFIG, until_stage="transfer")
    assert "\n" not in str(caught.value)
    assert main(["plan", str(CONFIG), f"{key}=[null]"]) == 1


@pytest.mark.parametrize("key", ["distill.sample_schedules", "evaluate.schedules"])
def test_schedules_edited_after_transfer_are_checked_before_anything_trains(key, whole, copy, run_tiny):
    before = {stage: done(copy, stage) for stage in ("align", "distill")}
    with pytest.raises(StudentError, match=f"^{key}: trans_points has 2 entries, the model has 4 layers"):
        run_tiny(copy, f"{key}=[[0, 1]]", config=CONFIG, from_stage="align")
    assert {stage: done(copy, stage) for stage in ("align", "distill")} == before


def test_a_schedule_of_another_length_names_its_key(tmp_path, run_tiny):
    with pytest.raises(StudentError, match="^student.trans_points: trans_points has 2 entries, the model has 4 layers"):
        run_tiny(tmp_path / "run", "student.trans_points=[0, 1]", config=CONFIG, until_stage="transfer")


NEVER = "data.length is 64: distill never reaches the state-space form of layers with TransPoints of "


@pytest.mark.parametrize(
    "points, sampled, named",
    [
        ("[0, 64, inf, 200]", "[]", "64, 200"),
        ("[0, 64, inf, 200]", "[[0, 8, 0, 200]]", "200"),
        ("[0, 63, inf, 16]", "[]", None),
        ("uniform:64", "[mamba]", None),
    ],
)
def test_trans_points_that_no_training_sequence_passes_are_named(points, sampled, named, tmp_path, run_tiny, capsys):
    overrides = [f"student.trans_points={points}", f"distill.sample_schedules={sampled}"]
    output = run_tiny(tmp_path / "run", *overrides, config=CONFIG, until_stage="transfer")
    assert main(["plan", str(CONFIG), *overrides]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    if named is None:
        assert "never reaches" not in output + printed
    else:
        assert f"\ntransfer: {NEVER}{named}; raise data.length, or lower them\n" in output
        assert f"{NEVER}{named}; raise data.length, or lower them" in printed


@pytest.mark.parametrize("key", ["distill.sample_schedules", "evaluate.schedules"])
@pytest.mark.parametrize("spec", ["paper-v10", [0, 1], -1, {"a": 1}])
def test_schedules_that_are_none_are_refused_before_training(key, spec, tmp_path, run_tiny):
    with pytest.raises(StudentError, match=f"^{key}: trans_points"):
        run_tiny(tmp_path / "run", f"{key}={json.dumps([spec])}", config=CONFIG, until_stage="transfer")
    assert not (tmp_path / "run" / "transfer" / "student").exists()
