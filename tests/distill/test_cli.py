"""The command line: what each command prints, exit codes, and errors that are one line."""

import json
import os
import runpy
import sys

import pytest
from transformers import AutoTokenizer

import transpoint.distill.stages.runner
from run_files import STAGES, TINY
from transpoint.distill.cli import COMMANDS, main
from transpoint.distill.config import describe_keys
from transpoint.distill.run.files import read_json
from transpoint.teachers.random import random_teacher

HELDOUT = TINY.parent / "sample" / "heldout.jsonl.zst"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines are not wrapped, and what the command line sets for its process stays in this test."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def say(capsys):
    """say(*arguments) -> (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def complaint(answer):
    """The message of a command that failed: one line, and nothing else on standard error."""
    code, _, err = answer
    assert code == 1 and err.startswith("transpoint: error: ") and err.count("\n") == 1
    assert "Traceback" not in err
    return err.removeprefix("transpoint: error: ").rstrip("\n")


# Help and usage


def test_help_names_every_command(say):
    code, out, err = say("--help")
    assert code == 0 and err == ""
    for command in COMMANDS:
        assert f"\n    {command} " in out or f"\n    {command}\n" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, say):
    code, out, err = say(command, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: transpoint {command} [-h] [--debug]")
    description = " ".join(out.split("\n\n")[1].split())
    assert description in " ".join(say("--help")[1].split())


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "the following arguments are required: COMMAND"),
        (["rnu"], "invalid choice: 'rnu'"),
        (["run"], "the following arguments are required: CONFIG"),
        (["run", "a.yaml", "--from", "training"], "argument --from: invalid choice: 'training'"),
        (["run", "a.yaml", "--util", "align"], "unrecognized arguments: --util align"),
        (["run", "a.yaml", "--until", "align", "b"], "unrecognized arguments: b"),
        (["status", "run", "a=1"], "unrecognized arguments: a=1"),
        (["export", "run", "--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
        (["eval", "model", "--length", "0"], "is not a whole number of at least 1"),
        (["push", "run"], "the following arguments are required: REPO_ID"),
    ],
)
def test_bad_usage(arguments, told, say):
    code, out, err = say(*arguments)
    assert code == 2 and out == "" and err.startswith("usage: transpoint") and told in err


# Errors


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["run", "gone.yaml"], "no config file 'gone.yaml'"),
        (["plan", TINY, "align.step=1"], "unknown key 'align.step' (value 1); did you mean 'align.steps'?"),
        (["plan", TINY, "student.keep_attention=[9]"], "student.keep_attention holds layer 9, the teacher has 0 to 3"),
        (
            ["plan", TINY, "student.keep_attention=1.0"],
            "student.keep_attention is 1.0: all 4 layers keep attention, so there is nothing to convert",
        ),
        (["status", "gone"], "'gone' is no run folder: it has no recipe.yaml"),
        (["export", "gone"], "'gone' is no run folder: it has no recipe.yaml"),
        (["push", "gone", "owner/name"], "'gone' is no run folder: it has no recipe.yaml"),
    ],
)
def test_errors_are_one_line(arguments, told, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint(say(*arguments)) == told
    assert not list(tmp_path.iterdir())


def test_unknown_teachers(say):
    assert complaint(say("plan", TINY, "teacher.source=random-lama")).endswith("did you mean 'random-llama'?")
    assert complaint(say("plan", TINY, "teacher.source=smollm-135m")).endswith("did you mean 'smollm2-135m'?")
    told = complaint(say("eval", "model", "--teacher", "random-lama", "--text", HELDOUT))
    assert told.endswith("did you mean 'random-llama'?")


def test_a_run_without_a_student(say, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY.read_text())
    assert (
        complaint(say("export", tmp_path)) == f"'{tmp_path}' has no finished student yet; run `transpoint run {path}`"
    )
    assert complaint(say("generate", tmp_path, "Hello")).endswith(f"run `transpoint run {path}`")
    told = complaint(say("push", tmp_path, "owner/name"))
    assert told.startswith(f"'{tmp_path}' has no finished export: `transpoint run {path}` makes one")
    assert "--text" in complaint(say("eval", "random-model"))
    assert complaint(say("generate", "nowhere", "Hello")).startswith(
        "no model 'nowhere': neither a folder nor a hub id"
    )


@pytest.mark.parametrize(
    "error, told",
    [
        (
            RuntimeError("first line\n  and second"),
            "RuntimeError: first line and second (run with --debug for a traceback)",
        ),
        (KeyError("key"), "KeyError: 'key' (run with --debug for a traceback)"),
    ],
)
def test_what_nobody_thought_of_is_one_line_too(error, told, say, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(transpoint.distill.stages.runner, "run_recipe", fail)
    assert complaint(say("run", TINY)) == told
    with pytest.raises(type(error)):
        main(["run", str(TINY), "--debug"])


def test_debug_shows_the_traceback_of_known_errors_too():
    with pytest.raises(ValueError, match="no config file"):
        main(["run", "gone.yaml", "--debug"])


def test_interrupted(say, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(transpoint.distill.stages.runner, "run_recipe", interrupt)
    code, out, err = say("run", TINY)
    assert (code, out) == (130, "")
    assert err == (
        "transpoint: error: interrupted; the same command (without --from) goes on from the last checkpoint\n"
    )


# Commands


def test_keys(say):
    code, out, _ = say("keys")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert code == 0 and [tuple(row) for row in rows] == describe_keys()


def test_run_says_what_is_reused_and_sums_up(tiny_copy, say):
    code, out, err = say("run", TINY, f"run.dir={tiny_copy}")
    assert (code, err) == (0, "")
    assert "".join(f"{stage}: done before, reused\n" for stage in STAGES) in out
    assert "layer plan: MAMA  (2 of 4 layers are Mamba-2)" in out
    kl = read_json(tiny_copy / "distill" / "done.json")["quality"]["kl"]
    (row,) = [line for line in out.splitlines() if "after distill" in line]
    assert f" {kl:.4f} " in row
    assert f"checkpoint: {tiny_copy}/export/native" in out and "AutoModelForCausalLM.from_pretrained(" in out


def test_run_with_options_anywhere(tmp_path, say):
    code, out, _ = say("run", "--until", "transfer", TINY, f"run.dir={tmp_path / 'run'}", "--debug", "run.seed=5")
    assert code == 0 and "transfer: not run yet" in out and "calibrate" not in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["data", "transfer"]
    assert "seed: 5" in (tmp_path / "run" / "recipe.yaml").read_text()
    code, out, _ = say(
        "run", TINY, f"run.dir={tmp_path / 'run'}", "--from", "transfer", "--until", "transfer", "run.seed=5"
    )
    assert code == 0 and "transfer: asked for by --from transfer" in out


def test_text_in_square_brackets_is_shown_as_it_is(tiny_copy, say):
    """Models write such things; they are no markup."""
    prompt = "[/INST] [bold] [red]?"
    code, out, err = say("run", TINY, f"run.dir={tiny_copy}", f"evaluate.prompts=['{prompt}']")
    assert (code, err) == (0, "") and f"question: {prompt}\n" in out
    assert (
        'evaluate: changed: evaluate.prompts (["What is the capital of France?"] -> ["[/INST] [bold] [red]?"])' in out
    )
    (tiny_copy / "recipe.yaml").write_text(
        (tiny_copy / "recipe.yaml").read_text().replace(prompt, "[/other]"), encoding="utf-8"
    )
    code, out, err = say("status", tiny_copy)
    assert (code, err) == (0, "") and '-> ["[/other]"])' in out


def test_plan_shows_what_would_be_done_and_writes_nothing(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = say("plan", TINY)
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells[:4] == [["0", "mamba2"], ["1", "attention"], ["2", "mamba2"], ["3", "attention"]]
    assert [
        "model.layers.0.self_attn.out_proj.weight",
        "all",
        "copy",
        "model.layers.0.self_attn.o_proj.weight",
    ] in cells
    assert [
        "model.layers.0.self_attn.in_proj.weight",
        "128:192 C",
        "scale",
        "model.layers.0.self_attn.q_proj.weight * 0.25",
    ] in cells
    # Embedding and final norm, four layers of attention, MLP and norms; a mixer has a gate, steps and so on more.
    attention, mixer = 64 * (64 + 32 + 32 + 64), 64 * (64 + 32 + 32 + 64 + 4) + 64 * 64 + 128 * 5 + 3 * 4 + 64
    rest = 259 * 64 + 64 + 4 * (3 * 64 * 128 + 2 * 64)
    assert (
        f"parameters: {rest + 4 * attention:,} in the teacher, {rest + 2 * attention + 2 * mixer:,} in the student"
        in out
    )
    assert "key/value cache: 256 bytes a token saved of 512 (bfloat16)" in out
    assert "the states that take its place are 8,192 bytes a sequence" in out
    assert "sliding windows" not in out
    assert "sliding windows are given up in layers [0, 2]" in say("plan", TINY, "teacher.source=random-mistral")[1]


def test_status(tiny_copy, say):
    code, out, err = say("status", tiny_copy)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert (code, err) == (0, "") and [row[:2] for row in rows] == [[stage, "done"] for stage in STAGES]
    for row in rows:
        record = read_json(tiny_copy / row[0] / "done.json")
        assert row[2] == (f"{record['quality']['kl']:.4f}" if "quality" in record else "")
        assert row[3] == ("5,120" if row[0] in ("align", "distill") else "") and row[4] == record["finished"]


def test_status_says_how_many_steps_were_skipped(tiny_copy, say):
    record = read_json(tiny_copy / "align" / "done.json")
    record["training"]["skipped"] = 3
    (tiny_copy / "align" / "done.json").write_text(json.dumps(record))
    rows = [line for line in say("status", tiny_copy)[1].splitlines() if "skipped" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["align"] and " 5,120 (3 steps skipped) " in rows[0]


def test_status_says_what_would_run_and_why(tiny_copy, say):
    recipe = tiny_copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("distill:\n  steps: 20", "distill:\n  steps: 99"))
    (tiny_copy / "evaluate" / "stage.json").unlink()
    _, out, _ = say("status", tiny_copy)
    states = dict(line.replace("│", "").split(maxsplit=1) for line in out.splitlines() if line.startswith("│"))
    assert states["align"].startswith("done ")
    assert states["distill"].startswith("would run: changed: distill.steps (20 -> 99)")
    assert states["export"].startswith("would run: changed: what distill made")
    assert states["evaluate"].startswith("would run: not run yet")


@pytest.mark.parametrize("options, format", [([], "native"), (["--format", "custom"], "custom")])
def test_export(options, format, tiny_copy, say, unverified, tmp_path):
    """Of the latest student; verification itself is tested with the exports."""
    code, out, err = say("export", tiny_copy, *options)
    target = tiny_copy / "exports" / f"{format}-float32"
    assert (code, err.count("error")) == (0, 0)
    assert out == f"{target}: the distill stage's student; logits differ by 1.0e-06, decoding by 2.0e-06\n"
    assert "after distill" in (target / "README.md").read_text() and (target / "modeling_hybrid.py").exists() == bool(
        options
    )
    code, out, _ = say("export", tiny_copy, "--dtype", "bfloat16", "--out", tmp_path / "other", *options)
    assert code == 0 and read_json(tmp_path / "other" / "config.json")["dtype"] == "bfloat16"


def test_eval_measures_as_the_run_did(tiny_run, say, tmp_path):
    record = read_json(tiny_run / "evaluate" / "done.json")
    quality, recall = record["quality"], {name: found["recall"] for name, found in record["measures"].items()}

    def rows(out):
        lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
        lines = [[cell.strip() for cell in line] for line in lines]
        return [line for line in lines if len(line) == 5], [line for line in lines if len(line) < 5]

    code, out, _ = say("eval", tiny_run, "--teacher", "random-llama", "--json", tmp_path / "all.json")
    own, beside = rows(out)
    assert code == 0 and [row[0] for row in own] == ["teacher", str(tiny_run)]
    assert own[0][1] == "0.0000" and own[0][4] == "100.0%"
    expected = ["{kl:.4f}", "{perplexity:.2f}", "{bits_per_byte:.4f}", "{same_top:.1%}"]
    assert own[1][1:] == [form.format(**quality) for form in expected]
    found = [(*row[1:], row[0]) for row in beside if row[0].endswith("(192 tokens)")]
    pairs = zip(recall["teacher"], recall["student"], strict=True)
    assert found == [(f"{a['accuracy']:.1%}", f"{b['accuracy']:.1%}", f"{a['task']} (192 tokens)") for a, b in pairs]
    written = read_json(tmp_path / "all.json")
    assert written["quality"]["student"]["kl"] == pytest.approx(quality["kl"])
    assert written["measures"]["teacher"]["recall"] == recall["teacher"]
    code, out, _ = say("eval", tiny_run, "evaluate.recall=[]", "evaluate.lengths=[128]")  # the latest student alone
    _, (row, *beside) = rows(out)  # without the columns that compare with a teacher
    assert code == 0 and row[1:] == [f"{quality['perplexity']:.2f}", f"{quality['bits_per_byte']:.4f}"]
    assert [len(line) for line in beside if "128" in line[0]] == [2, 2]


@pytest.mark.slow
def test_eval_takes_settings_after_its_text(tiny_run, say, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words to measure on " * 40)
    code, out, _ = say("eval", tiny_run, "--text", text, "evaluate.recall=[passkey]", "evaluate.recall_lengths=[200]")
    assert code == 0 and "passkey (200 tokens)" in out and "multikey" not in out
    code, out, _ = say("eval", tiny_run, "--text", text, "evaluate.recall_lengths=[200,2000]")
    assert code == 0 and "recall at 2000 tokens is left out: the model takes 512" in out
    code, out, _ = say("eval", tiny_run, "--text", text, "evaluate.recall_lengths=[200,500]", "--length", 16)
    assert code == 0 and "(500 tokens)" in out
    text.write_text("some words to measure on " * 12)
    code, out, _ = say("eval", tiny_run, "--text", text, "evaluate.recall_lengths=[200,500]", "--length", 16)
    assert code == 0 and "recall at 500 tokens is left out: the held-out text has 301" in out
    assert "(200 tokens)" in out and "(500 tokens)" not in out
    assert complaint(say("eval", tiny_run, "evaluate.recal=[]")).startswith("unknown key 'evaluate.recal'")
    other = complaint(say("eval", tiny_run, "--text", text, "teacher.dtype=bfloat16"))
    assert other == "eval reads settings of evaluate and data alone: leave out teacher.dtype=bfloat16"
    assert complaint(say("eval", tiny_run, "--json", tmp_path / "nowhere" / "x.json")).startswith("there is no folder")


def test_eval_refuses_text_with_a_token_that_the_model_lacks(tiny_copy, say, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_copy / "distill" / "student")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tiny_copy / "distill" / "student")
    text = tmp_path / "text.txt"
    text.write_text("some words <pad> and more")
    assert complaint(say("eval", tiny_copy, "--text", text)).startswith(f"{text}: the text holds the token '<pad>' of ")


def test_generate_answers_as_evaluate_did(tiny_run, say):
    (entry,) = read_json(tiny_run / "evaluate" / "results.json")["answers"]
    for model in (tiny_run, tiny_run / "export" / "native"):
        code, out, _ = say("generate", model, entry["prompt"], "--max-new-tokens", 16)
        assert code == 0 and out == entry["student"] + "\n"


def test_the_module_is_run(tiny_copy, capsys, monkeypatch):
    """`python -m transpoint.distill CONFIG key=value` is `transpoint run CONFIG key=value`."""
    monkeypatch.setattr(sys, "argv", ["python", str(TINY), f"run.dir={tiny_copy}", "--until", "distill"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("transpoint.distill", run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "transfer: done before, reused\n" in said and "layer plan: MAMA" in said


def test_eval_refuses_another_tokenizer_and_minds_nothing_else(tmp_path, capsys):
    for name, seed in (("teacher", 0), ("model", 1), ("other", 1)):
        model, tokenizer = random_teacher("random-llama", seed)
        if name == "model":  # what changes no token of a text
            tokenizer.padding_side, tokenizer.chat_template = "left", None
            tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    path = tmp_path / "other" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(words))
    (tmp_path / "a.jsonl").write_text('{"text": "a text to measure on"}\n' * 9)
    more = ["--teacher", str(tmp_path / "teacher"), "--text", str(tmp_path / "a.jsonl"), "--length", "16"]
    assert main(["eval", str(tmp_path / "model"), *more]) == 0
    assert main(["eval", str(tmp_path / "other"), *more]) == 1
    assert "has another tokenizer than its teacher" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "other"), *more[2:]]) == 0
