"""compare: what may be compared, at how many tokens, and what is made of it."""

import statistics
import xml.etree.ElementTree as ElementTree

import pytest

from run_files import TINY, done
from transpoint.distill.cli import main
from transpoint.distill.compare import Compared, Comparison, Point, at_tokens, compare, load_recipes, training_tokens
from transpoint.distill.config import load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.report.comparison import rows_of
from transpoint.distill.run.files import read_json
from transpoint.distill.run.records import Measures, Quality, Recall
from transpoint.distill.stages import runner
from transpoint.distill.train.trainer import Stopped

QUICK = ["evaluate.recall=[]", "evaluate.cost_lengths=[]", "evaluate.prompts=[]", "evaluate.sequences=2"]


@pytest.fixture
def recipes(tmp_path):
    """Three on the tiny recipe: two share all up to align, one has another mixer."""
    texts = {
        "frozen": "distill: {teacher_lr: 0.0}",
        "free": "distill: {teacher_lr: 3.0e-4}",
        "rope": "student: {rope: true}\nexport: {format: custom}\nalign: {steps: 30}\ndistill: {steps: 10}",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return [str(tmp_path / f"{name}.yaml") for name in texts]


def test_recipes_stand_on_a_base_and_under_changes(recipes):
    found = load_recipes(recipes, ["align.lr=1e-3"], str(TINY))
    assert list(found) == ["frozen", "free", "rope"]
    assert {recipe.teacher.source for recipe in found.values()} == {"random-llama"}
    assert {recipe.align.lr for recipe in found.values()} == {1e-3}
    assert found["rope"].student.rope and found["free"].distill.teacher_lr == 3e-4


@pytest.mark.parametrize("tokens", [1000, 10_240, 99_999])
def test_stages_keep_their_proportions(tokens):
    recipe = load_recipe(TINY, ["align.steps=30", "distill.steps=90"])
    scaled = at_tokens(recipe, tokens)
    step = 4 * 64
    assert abs(training_tokens(scaled) - tokens) <= step
    assert abs(scaled.align.steps * step - tokens / 4) <= step
    assert (recipe.align.steps, recipe.distill.steps) == (30, 90)  # as it was


def test_what_cannot_be_compared(recipes, tmp_path):
    with pytest.raises(RunError, match=r"different numbers of tokens \(frozen 10,240, rope 17,920\): .* --tokens"):
        (tmp_path / "rope.yaml").write_text("align: {steps: 50}")
        load_recipes([recipes[0], recipes[2]], [], str(TINY))
    with pytest.raises(RunError, match="two recipes are called 'free'"):
        load_recipes([recipes[1], recipes[1]], [], str(TINY))
    (tmp_path / "other.yaml").write_text("teacher: {source: random-qwen3}")
    with pytest.raises(RunError, match="'other' and 'free' differ in teacher.source: .* --base or teacher.source="):
        load_recipes([recipes[1], str(tmp_path / "other.yaml")], [], str(TINY))
    (tmp_path / "measured.yaml").write_text("evaluate: {sequences: 3}")
    with pytest.raises(RunError, match="differ in evaluate"):
        load_recipes([recipes[1], str(tmp_path / "measured.yaml")], [], str(TINY))
    with pytest.raises(RunError, match="without steps cannot be given tokens"):
        load_recipes(recipes[:1], ["align.steps=0", "distill.steps=0"], str(TINY), tokens=1000)


@pytest.mark.slow
def test_a_comparison_shares_what_is_the_same_and_goes_on(recipes, tmp_path, capsys, unverified):
    out = tmp_path / "out"
    command = ["compare", *recipes[:2], *QUICK, "--base", str(TINY), "--tokens", "2560", "--seeds", "2"]
    command += ["--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"align: taken over from {out / 'frozen-seed0'}" in said
    assert said.count("align: not run yet") == 2  # one for each seed
    found = read_json(out / "comparison.json")
    assert [(run["recipe"], run["seed"]) for run in found["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("frozen", "free")
    ]
    for run in found["runs"]:
        folder = out / f"{run['recipe']}-seed{run['seed']}"
        assert run["quality"] == done(folder, "evaluate")["quality"]
        assert [point["stage"] for point in run["points"]] == ["transfer", "calibrate", "align", "distill"]
        assert (
            run["points"][-1]["tokens"] == 2_560 and run["points"][-1]["quality"] == done(folder, "distill")["quality"]
        )
    table = (out / "comparison.md").read_text()
    kl = [run["quality"]["kl"] for run in found["runs"] if run["recipe"] == "free"]
    assert f"{statistics.fmean(kl):.4f} ± {statistics.stdev(kl):.4f}" in table and kl[0] != kl[1]
    assert ElementTree.fromstring((out / "comparison.svg").read_text()).tag.endswith("svg")
    assert main(command) == 0
    assert capsys.readouterr().out.count("evaluate: done before, reused") == 4
    assert read_json(out / "comparison.json") == found


@pytest.mark.slow
def test_a_recipe_that_fails_leaves_the_others_be(recipes, tmp_path, capsys, unverified):
    (tmp_path / "native.yaml").write_text("student: {rope: true}")  # which a native export cannot hold
    (tmp_path / "layers.yaml").write_text("student: {keep_attention: [9]}")
    out = tmp_path / "out"
    steps = ["align.steps=1", "distill.steps=1"]
    bad = [str(tmp_path / f"{name}.yaml") for name in ("layers", "native")]
    command = ["compare", recipes[0], *bad, *steps, *QUICK, "--base", str(TINY)]
    assert main([*command, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "layers-seed0 failed: student.keep_attention holds layer 9" in captured.err
    assert "native-seed0 failed: export.format=native cannot hold" in captured.err
    found = read_json(out / "comparison.json")
    assert [run["recipe"] for run in found["runs"]] == ["frozen"] and list(found["failed"]) == [
        "layers-seed0",
        "native-seed0",
    ]
    assert "native-seed0 failed: export.format=native" in (out / "comparison.md").read_text()


def test_a_comparison_that_is_stopped_stops(recipes, tmp_path, monkeypatch):
    begun = []

    def stopped(recipe, console):
        begun.append(recipe.run.dir)
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr(runner, "run_recipe", stopped)
    with pytest.raises(Stopped):
        compare(load_recipes(recipes[:2], ["run.seed=7"], str(TINY)), tmp_path)
    assert begun == [str(tmp_path / "frozen-seed7")]


def test_means_over_seeds():
    def run(seed, kl, accuracy):
        recall = [Recall(task="passkey", length=64, accuracy=accuracy)]
        return Compared("a", seed, [Point("align", 100, Quality(kl=1.0))], Quality(kl=kl), Measures(recall=recall))

    teacher = Measures(recall=[Recall(task="passkey", length=64, accuracy=1.0)])
    found = Comparison(100, Quality(kl=0.0), teacher, [run(0, 0.25, 0.5), run(1, 0.75, 0.5)])
    assert rows_of(found) == [
        ["", "teacher", "a"],
        ["training tokens", "", "100 ± 0"],
        ["KL from teacher", "0.0000", "0.5000 ± 0.3536"],
        ["passkey (64 tokens)", "100.0%", "50.0% ± 0.0%"],
    ]
