"""select: what it asks the other stages for, and what becomes of what it finds."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from run_files import TINY, done
from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError, load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.run.files import read_json, write_json
from transpoint.distill.stages import stage_inputs
from transpoint.students import StudentConfig, StudentError
from transpoint.students.config import count_to_select, layer_plan
from transpoint.teachers.random import random_teacher

SELECT = ("student.keep_attention=select:2", "select.length=128", "select.items=2", "select.sequences=2")
WINDOW = "select.kl_with=window"
LAYERS = {"0", "1", "2", "3"}


@pytest.fixture(scope="module")
def selected(tmp_path_factory, run_tiny):
    """A run up to transfer."""
    folder = tmp_path_factory.mktemp("select") / "run"
    return folder, run_tiny(folder, *SELECT, until_stage="transfer")


def test_the_layers_found_are_those_that_keep_attention(selected):
    folder, said = selected
    selection = done(folder, "select")["selection"]
    kept = selection["kept"]["2"]
    assert done(folder, "transfer")["mixers"] == ["attention" if layer in kept else "mamba2" for layer in range(4)]
    assert f"select: attention is kept in {kept[0]}, {kept[1]} of 4 layers" in said
    assert selection["alone"].keys() == LAYERS and selection["kept"].keys() == LAYERS | {"4"}
    losses = {int(layer): score["kl"] + score["recall"] for layer, score in selection["alone"].items()}
    assert set(kept) == set(sorted(losses, key=losses.get)[-2:])


def test_what_it_calibrated_is_not_calibrated_again(selected, run_tiny, tmp_path, monkeypatch):
    """The student is the one whose layers were named and calibrated by themselves."""
    folder = selected[0]
    kept = f"student.keep_attention={done(folder, 'select')['selection']['kept']['2']}"
    run_tiny(tmp_path / "named", kept, until_stage="calibrate")
    monkeypatch.delattr("transpoint.distill.train.calibration.attention_pairs")
    run_tiny(tmp_path / "found", *SELECT, f"run.reuse=[{folder}]", until_stage="calibrate")
    assert done(tmp_path / "found", "calibrate")["layers"] == done(tmp_path / "named", "calibrate")["layers"]
    found, named = (load_file(tmp_path / of / "calibrate/student/model.safetensors") for of in ("found", "named"))
    assert found.keys() == named.keys() and all(torch.equal(found[name], named[name]) for name in named)


def test_the_scores_serve_any_number_of_layers(selected, run_tiny, tmp_path):
    folder = selected[0]
    more = (*SELECT[1:], "student.keep_attention=select:0.75", f"run.reuse=[{folder}]")
    said = run_tiny(tmp_path / "run", *more, until_stage="transfer")
    assert f"select: taken over from {folder}" in said
    kept = done(folder, "select")["selection"]["kept"]["3"]
    assert [i for i, mixer in enumerate(done(tmp_path / "run", "transfer")["mixers"]) if mixer == "attention"] == kept


@pytest.mark.parametrize(
    "override, same",
    [
        ("student.keep_attention=select:1", True),
        ("student.rope=true", False),
        ("calibrate.sequences=2", False),
        ("data.heldout=[/nowhere]", None),
        ("evaluate.sequences=3", True),
        ("select.window=8", False),
        ("select.recall_with=mixer", False),
        ("data.length=32", False),
        ("run.seed=3", True),
        ("run.precision=bf16", False),
        ("teacher.training_dtype=bfloat16", False),
    ],
)
def test_what_it_depends_on(override, same):
    needs = stage_inputs(load_recipe(TINY, [*SELECT]))["select"]
    if same is None:
        recipe = load_recipe(TINY, [*SELECT])
        recipe.data.heldout = recipe.data.heldout * 2
        assert stage_inputs(recipe)["select"] == needs
        return
    assert (stage_inputs(load_recipe(TINY, [*SELECT, override]))["select"] == needs) is same


def test_with_windows_alone_the_mixers_do_not_count():
    needs = stage_inputs(load_recipe(TINY, [*SELECT, WINDOW]))["select"]
    for override in ("student.keep_attention=select:1", "student.rope=true", "calibrate.sequences=2"):
        assert stage_inputs(load_recipe(TINY, [*SELECT, WINDOW, override]))["select"] == needs


@pytest.mark.parametrize(
    "more",
    [
        ["select.recall_with=mixer", "select.search=add", "select.beam=2"],
        [WINDOW, "select.search=remove", "select.sinks=2"],
        ["select.search=gates", "select.gate_steps=3"],
        [WINDOW, "select.kl_weight=0", "select.recall_weight=0", "select.error_weight=1"],
        ["student.mixer=transmamba"],
        ["data.streaming=true", "data.max_train_tokens=null"],
    ],
    ids=str,
)
def test_other_ways(more, run_tiny, tmp_path):
    run_tiny(tmp_path, *SELECT, *more, until_stage="select")
    selection = done(tmp_path, "select")["selection"]
    assert selection["alone"].keys() == LAYERS
    joint = any(option in ("select.search=add", "select.search=remove") for option in more)
    assert (selection["scores"].keys() == LAYERS | {"4"}) is joint
    assert [len(selection["kept"][str(k)]) for k in range(5)] == [0, 1, 2, 3, 4]
    if any("error_weight" in option for option in more):
        errors = {int(layer): score["error"] for layer, score in selection["alone"].items()}
        assert selection["kept"]["2"] == sorted(sorted(errors, key=errors.get)[-2:]) and all(errors.values())


def test_a_plan_before_and_after(selected, capsys):
    folder = selected[0]
    kept = done(folder, "select")["selection"]["kept"]["2"]

    def plan(*overrides):
        assert main(["plan", str(TINY), *SELECT, *overrides]) == 0
        out = capsys.readouterr().out
        rows = [line.split("│")[1:3] for line in out.split("transfer plan")[0].splitlines() if line.startswith("│")]
        return out, [int(layer) for layer, mixer in rows if mixer.strip() == "attention"]

    out, layers = plan(f"run.dir={folder}")
    assert layers == kept and "for select to find" not in out
    out, layers = plan("run.dir=/nowhere")
    assert layers == [1, 3] and "which 2 layers keep attention is for select to find" in out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", ["teacher.training_dtype=bfloat16", "teacher.dtype=bfloat16"])
def test_teachers_in_bfloat16(dtype, precision, run_tiny, tmp_path):
    run_tiny(tmp_path, *SELECT, dtype, f"run.precision={precision}", until_stage="select")
    scores = done(tmp_path, "select")["selection"]["alone"]
    assert scores.keys() == LAYERS and all(math.isfinite(score["kl"]) for score in scores.values())


def test_scores_that_are_all_nothing(run_tiny, tmp_path):
    with pytest.raises(RunError, match="select has nothing to go by: set select.kl_weight or select.recall_weight"):
        run_tiny(tmp_path, *SELECT, "select.kl_weight=0", "select.recall_weight=0", until_stage="select")


def test_a_plan_without_text(capsys):
    assert main(["plan", str(TINY), *SELECT, "data.train=[]"]) == 0
    assert "which 2 layers keep attention is for select to find" in capsys.readouterr().out


@pytest.mark.parametrize("count", ["4", "9", "1.0"])
def test_as_many_layers_as_there_are(count, run_tiny, tmp_path):
    with pytest.raises(StudentError, match=f"select:{count}': of the teacher's 4 layers at least one is to be"):
        run_tiny(tmp_path, *SELECT, f"student.keep_attention=select:{count}", until_stage="select")


def test_texts_are_no_longer_than_the_teacher_takes(run_tiny, tmp_path):
    said = run_tiny(tmp_path, *SELECT, "select.length=1024", until_stage="select")
    assert "select: texts of 512 tokens, as the teacher takes no longer ones" in said


def test_a_teacher_whose_predictions_are_not_finite(run_tiny, tmp_path):
    teacher, tokenizer = random_teacher("random-llama")
    with torch.no_grad():
        teacher.model.layers[2].post_attention_layernorm.weight[0] = math.nan
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    more = (*SELECT, f"teacher.source={tmp_path / 'teacher'}", "select.kl_with=window")
    with pytest.raises(RunError, match="without the attention of layer 0 the teacher's predictions are not finite"):
        run_tiny(tmp_path / "run", *more, until_stage="select")


@pytest.mark.parametrize("spec", ["select:two", "select:1.5", "select:-1", "select:nan"])
def test_what_is_no_number_of_layers(spec):
    with pytest.raises(ConfigError, match=f"student.keep_attention is '{spec}'; expected .* 'select:K'"):
        load_recipe(TINY, [f"student.keep_attention={spec}"])


@pytest.mark.parametrize(
    "spec, count", [("select:0.5", 15), ("select:7", 7), ("select:0", 0), ("select:1", 1), (0.5, None)]
)
def test_how_many(spec, count):
    assert count_to_select(spec, 30) == count


def test_without_a_run_nothing_is_chosen():
    with pytest.raises(StudentError, match="no layers have been chosen; run the stage select"):
        layer_plan(StudentConfig(keep_attention="select:2"), 4)


def test_a_record_that_has_lost_its_layers_is_asked_for_again(selected, run_tiny, tmp_path):
    shutil.copytree(selected[0], tmp_path / "run")
    record = tmp_path / "run" / "select" / "done.json"
    write_json(record, read_json(record) | {"selection": {"kept": 3}})
    with pytest.raises(RunError, match="no layers have been chosen .* --from select"):
        run_tiny(tmp_path / "run", *SELECT, "student.keep_attention=select:3", until_stage="transfer")
