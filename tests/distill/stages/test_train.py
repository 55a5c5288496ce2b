"""Runs from scratch: what they learn, which stages they have, and that no teacher is spoken of where there is none."""

import io
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from run_files import CONFIGS, TINY, done, metrics, student
from scripts.count_bytes import bits_per_byte
from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError, load_recipe
from transpoint.distill.errors import RunError
from transpoint.distill.objectives import LanguageModeling
from transpoint.distill.report.page import write_report
from transpoint.distill.report.summary import summary
from transpoint.distill.stages import stage_inputs
from transpoint.distill.stages.pipeline import pipeline_of
from transpoint.students import StudentConfig, untrained

SCRATCH = CONFIGS / "tiny-scratch.yaml"
SHORT = ("train.steps=6", "train.log_every=2", "train.checkpoint_every=2", "teacher.sizes.hidden_size=16")


@pytest.fixture(scope="module")
def scratch_output(run_tiny, tmp_path_factory):
    """(run folder, what the run printed). Only to be read."""
    folder = tmp_path_factory.mktemp("scratch") / "run"
    return folder, run_tiny(folder, config=SCRATCH)


@pytest.fixture(scope="module")
def scratch_run(scratch_output):
    return scratch_output[0]


def test_it_has_learned_more_than_which_byte_follows_which(scratch_run):
    reached = done(scratch_run, "train")["quality"]["bits_per_byte"]
    assert done(scratch_run, "transfer")["quality"]["bits_per_byte"] > 7.5  # 8 is chance
    alone, pairs = (bits_per_byte(load_recipe(SCRATCH), n) for n in (1, 2))
    assert reached < pairs - 0.1 < alone - 0.5
    assert done(scratch_run, "evaluate")["quality"]["bits_per_byte"] == pytest.approx(reached, rel=1e-3)


def test_it_has_the_stages_that_need_no_teacher(scratch_run):
    stages = [stage.name for stage in pipeline_of(load_recipe(SCRATCH))]
    assert stages == ["transfer", "train", "export", "evaluate"]
    assert {path.parent.name for path in scratch_run.glob("*/done.json")} == set(stages)
    assert "train" not in [stage.name for stage in pipeline_of(load_recipe(TINY))]


def test_all_parameters_train(scratch_run):
    before, after = (
        load_file(scratch_run / stage / "student" / "model.safetensors") for stage in ("transfer", "train")
    )
    assert [name for name in before if torch.equal(before[name], after[name])] == []


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(run_tiny, tmp_path):
    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    options = {"config": SCRATCH, "until_stage": "train"}
    run_tiny(tmp_path / "whole", *SHORT, **options)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "parts", *SHORT, **options, on_step=stop)
    assert "train: going on from step 2" in run_tiny(tmp_path / "parts", *SHORT, **options)
    assert student(tmp_path / "parts", "train") == student(tmp_path / "whole", "train")
    assert metrics(tmp_path / "parts", "train") == metrics(tmp_path / "whole", "train")


def test_the_loss_is_the_cross_entropy_of_each_document_by_all_tokens():
    model = untrained("llama", StudentConfig(keep_attention=[1]), hidden_size=32, num_hidden_layers=2)
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(20), torch.cat([torch.arange(8), torch.arange(12)])])
    loss, _ = LanguageModeling(model)({"input_ids": ids, "position_ids": positions})
    documents = ids[:1], ids[1:, :8], ids[1:, 8:]
    total = sum(model(one, labels=one).loss * (one.shape[1] - 1) for one in documents)
    assert loss.item() == pytest.approx(total.item() / ids.numel(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, model.model.embed_tokens.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(total / ids.numel(), model.model.embed_tokens.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_first_weights_depend_on_seed_and_sizes_of_runs_from_scratch_alone():
    def needs(config, *overrides):
        return stage_inputs(load_recipe(config, overrides))["transfer"]

    assert needs(SCRATCH) != needs(SCRATCH, "run.seed=1")
    assert needs(SCRATCH) != needs(SCRATCH, "teacher.sizes.hidden_size=32")
    assert needs(TINY) == needs(TINY, "run.seed=1")
    assert "sizes" not in needs(TINY)["teacher"]  # or what earlier versions made would have to be made again
    assert needs(TINY) != needs(TINY, "teacher.sizes.hidden_size=32")


@pytest.mark.slow
def test_a_transmamba_student_trains_at_its_own_transpoints(run_tiny, tmp_path):
    options = [*SHORT, "student.mixer=transmamba", "student.keep_attention=[]", "student.trans_points=[0,16]"]
    said = run_tiny(tmp_path, *options, config=SCRATCH, until_stage="train")
    assert "never reaches" not in said
    lines = metrics(tmp_path, "train")
    assert lines[-1]["loss"] < lines[0]["loss"] and 0 < lines[-1]["attention"] < 0.5
    assert done(tmp_path, "train")["trained_schedules"] == {"[0, 16]": [0, 16]}
    beyond = run_tiny(tmp_path, *options, "student.trans_points=[0,64]", config=SCRATCH, until_stage="transfer")
    assert "train never reaches the state-space form of layers with TransPoints of 64" in beyond


@pytest.mark.parametrize(
    "override, message",
    [
        ("teacher.source=random-llama", "train has settings, and trains models from scratch alone"),
        ("tune.steps=5", "an untrained model, and the stage tune, which this recipe asks for, takes something from"),
        ("orient.steps=5", "and the stage orient, which"),
        ("student.keep_attention=select:1", "and the stage select, which"),
        ("teacher.source=smollm2-135m", "expected none: teacher.source 'smollm2-135m' has sizes of its own"),
    ],
)
def test_what_needs_a_teacher_is_refused(override, message):
    with pytest.raises(ConfigError) as caught:
        load_recipe(SCRATCH, [override])
    assert message in str(caught.value)


def words_on(folder, said):
    """What a run from scratch shows, but for its recipe."""
    card = (folder / "export" / "native" / "README.md").read_text().partition("## Recipe")[0]
    page = write_report(folder).read_text()
    return said, card, re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).partition("The whole recipe")[0]


@pytest.mark.slow
def test_nothing_that_it_shows_speaks_of_a_teacher(scratch_output, capsys):
    folder, said = scratch_output
    console = Console(file=io.StringIO(), width=200)
    for part in summary(folder):
        console.print(part)
    shown = console.file.getvalue()
    for text in (*words_on(folder, said), shown):
        assert not re.search(r"teacher|KL|same top|distill", text)
    assert "after train" in shown and "bits per byte" in shown and "text: It was the" in shown
    for arguments in (["status", str(folder)], ["plan", str(SCRATCH)], ["eval", str(folder)]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert not re.search(r"teacher|KL|same top", said) and re.search("bits per byte|parameters", said)


def test_it_goes_on_with_a_text(scratch_run, capsys):
    assert main(["generate", str(scratch_run), "It was the ", "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr().out
    assert said.strip() and "im_start" not in said


@pytest.mark.parametrize("command", ["synthesize", "cache-teacher"])
def test_commands_that_ask_a_teacher_are_refused(command, capsys):
    assert main([command, str(SCRATCH)]) == 1
    assert "'scratch-llama' is an untrained model: it has nothing to say" in capsys.readouterr().err


@pytest.mark.slow
def test_attention_alone_is_compared_with_a_hybrid(tmp_path, capsys):
    (tmp_path / "attention.yaml").write_text("student: {keep_attention: 1.0}\nexport: {format: custom}")
    (tmp_path / "narrow.yaml").write_text("teacher: {sizes: {intermediate_size: 32}}")
    recipes = [str(tmp_path / name) for name in ("attention.yaml", "narrow.yaml")]
    out = tmp_path / "out"
    few = [f"evaluate.{key}=[]" for key in ("recall", "cost_lengths", "prompts")]
    assert main(["compare", *recipes, *SHORT, *few, f"--base={SCRATCH}", f"--out={out}"]) == 0
    table = (out / "comparison.md").read_text()
    assert "# 2 recipes" in table and "|  | attention | narrow |" in table and "teacher" not in table
    assert "bits per byte" in (out / "comparison.svg").read_text()
    card = (out / "attention-seed0" / "export" / "custom" / "README.md").read_text()
    assert "# A Transformer, trained from scratch" in card


def test_the_native_format_refuses_attention_alone(run_tiny, tmp_path):
    with pytest.raises(RunError, match="native cannot hold this student: .* use format custom"):
        run_tiny(tmp_path, *SHORT, "student.keep_attention=1.0", config=SCRATCH)
