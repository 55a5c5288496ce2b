"""The command line. Each command is one function below; `--help` loads no library that takes time."""

import argparse
import logging
import os
import re
import shlex
import sys
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rich.markup import escape
from rich.table import Table

from ..students.modeling.errors import StudentError
from ..teachers.errors import TeacherError
from .console import console_of
from .errors import DistillError
from .export.formats import DTYPES, FORMATS, QUANTISED
from .run.seconds import OTHER, part
from .run.threads import leave_busy_cores, spin_briefly
from .shipped import shipped
from .stages.pipeline import names, pipeline_of

if TYPE_CHECKING:
    from ..students import HybridForCausalLM
    from .config import Recipe
    from .data.corpus import Corpus
    from .data.packed import PackedDataset


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 (an error, in one line), 2 (bad usage), 130 (interrupted), 143
    (stopped by SIGTERM, with everything saved)."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no overrides after an option; a person writes them anywhere.
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    for name in ("config", "run", "model", "out", "json", "base"):  # `--out=~/x` reaches us as it is
        if isinstance(path := getattr(options, name, None), str):
            setattr(options, name, os.path.expanduser(path))
    spin_briefly(os.environ)
    try:
        if options.command in TRAINING and (said := leave_busy_cores(os.environ)):
            print(said)
        with part(OTHER):
            with part("importing"):
                _quiet_libraries(options.debug, loading=options.command not in LIGHT)
            COMMANDS[options.command](options)
    except KeyboardInterrupt:
        _complain("interrupted; the same command (without --from) goes on from the last checkpoint")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if options.debug or (error.name or "").partition(".")[0] not in _TRAIN:
            raise
        _complain(f"{error.name} is missing: pip install 'transpoint[train]'")
        return 1
    except Exception as error:
        if options.debug:
            raise
        known = isinstance(error, DistillError | StudentError | TeacherError)
        message = " ".join(str(error).split())
        _complain(message if known else f"{type(error).__name__}: {message} (run with --debug for a traceback)")
        return getattr(error, "exit_code", 1)
    return 0


# Of the extra `train`.
_TRAIN = {
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "omegaconf",
    "filelock",
    "gguf",
    "zstandard",
    "jinja2",
    "psutil",
}


def init(options) -> None:
    from .shipped import CONFIGS, write_recipe

    target = Path(options.config)
    for path in write_recipe(target, options.like):
        print(f"wrote {path}")
    recipe, several = (shlex.quote(str(path)) for path in (target, CONFIGS / "accelerate" / "ddp.yaml"))
    if options.like in shipped(tasks=True):
        print(f"\ntranspoint tasks {recipe}")
        return
    print(f"\ntranspoint plan {recipe}\ntranspoint run {recipe}")
    print(f"accelerate launch --config_file {several} -m transpoint.distill {recipe}")


def run(options) -> None:
    with part("importing"):
        from .config import load_recipe
        from .report.summary import summary
        from .stages.runner import run_recipe

    session = run_recipe(load_recipe(options.config, options.overrides), options.from_stage, options.until)
    for entry in summary(session.root) if session.accelerator.is_main_process else ():
        session.console.print()
        session.console.print(entry, highlight=False, markup=False, soft_wrap=True)


def plan(options) -> None:
    import copy
    import json

    import torch

    from ..students import plan_student
    from ..students.modeling.configuration_mixers import have_trans_points, names_with_trans_points
    from .config import load_recipe
    from .models import load_config, teacher_of
    from .stages.preflight import gpu_name, what_will_run
    from .stages.processes import precision
    from .stages.select import as_far_as_known
    from .stages.transfer import start_folder
    from .train.groups import only_these_train
    from .trans_points import check_schedules, never_distilled

    console = console_of()
    recipe = load_recipe(options.config, options.overrides)
    device = torch.device("cpu" if recipe.run.device == "cpu" else _device())
    products, gpu = precision(recipe, device), gpu_name(device)
    teacher, _ = teacher_of(recipe)
    longest = getattr(teacher.config, "max_position_embeddings", None)
    check_schedules(recipe, teacher.config.num_hidden_layers, longest)
    config, not_yet = as_far_as_known(recipe, teacher.config.num_hidden_layers)
    start = start_folder(recipe)
    student, transfers = plan_student(teacher, config, None if start is None else load_config(start))
    mixers = student.config.mixers
    points = student.trans_points if have_trans_points(mixers) else None
    named = f"layer plan: {config.plan}" if config.plan else "layer plan"
    table = Table("layer", "mixer", *(["TransPoint"] if points else []), title=named)
    for layer, mixer in enumerate(mixers):
        name = mixer if mixer == "attention" else f"[bold]{mixer}[/bold]"
        table.add_row(str(layer), name, *([str(points[layer])] if points else []))
    console.print(table, *(() if recipe.from_scratch else (transfers.table(),)))
    for mixer, options in (student.config.other_options or {}).items():
        settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in options.items())
        console.print(f"{mixer}, which kept attention becomes: {settings}", highlight=False)
    if not_yet is not None:
        console.print(not_yet, highlight=False)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (teacher, student))
    for stage in pipeline_of(recipe):
        if stage.groups is None:
            continue
        taken = teacher if stage.takes_teacher(recipe) else None
        own = copy.deepcopy(student)  # a stage may give it adapters
        groups = stage.groups(own, recipe)
        only_these_train(own, groups)
        console.print(what_will_run(stage.name, groups, own, taken, recipe, products, device=gpu), highlight=False)
    beside = f"{after:,}" if recipe.from_scratch else f"{before:,} in the teacher, {after:,} in the student"
    console.print(f"parameters: {beside}", highlight=False)
    tokens = [2 * g.num_kv_heads * g.head_dim * 2 for g in map(student.geometry, range(len(mixers)))]
    converted = [(size, mixer) for size, mixer in zip(tokens, student.mixer_layers(), strict=True) if mixer is not None]
    saved = sum(size - mixer.token_bytes() for size, mixer in converted)
    state = sum(mixer.state_bytes() for _, mixer in converted)
    console.print(
        f"key/value cache: {saved:,} bytes a token saved of {sum(tokens):,} "
        f"(bfloat16); the states that take its place are {state:,} bytes a sequence, whatever its length",
        highlight=False,
    )
    if points:
        console.print(
            f"in {names_with_trans_points()} layers that is so past the TransPoint; up to it they keep keys and values",
            highlight=False,
        )
        if line := never_distilled(recipe, mixers, longest):
            console.print(line, highlight=False)
    if student.windows_given_up:
        console.print(f"sliding windows are given up in layers {student.windows_given_up}: a state has none")


def status(options) -> None:
    from .config import load_recipe
    from .run.folder import StageFolder
    from .run.records import Quality, Training, shown
    from .stages.inputs import finished_elsewhere, stage_inputs

    root = _run_folder(options.run)
    recipe = load_recipe(root / "recipe.yaml")
    needs = stage_inputs(recipe)
    measure = "held-out bits per byte" if recipe.from_scratch else "held-out KL"
    table = Table("stage", "state", measure, "tokens", "finished", title=escape(str(root)))
    for stage in [stage.name for stage in pipeline_of(recipe)]:
        folder = StageFolder(root, stage)
        reason, record = folder.why_not_reusable(needs[stage]), folder.record
        quality, training = record.quality or Quality(), record.training or Training()
        if reason is not None and (other := finished_elsewhere(recipe, stage, needs[stage])) is not None:
            reason = f"taken over from {other.path.parent}"
        table.add_row(
            stage,
            "done" if reason is None else f"would run: {escape(reason)}",
            shown(quality.bits_per_byte if recipe.from_scratch else quality.kl, "{:.4f}"),
            shown(training.tokens, "{:,}") + (f" ({training.skipped} steps skipped)" if training.skipped else ""),
            record.finished or "",
        )
    console_of().print(table)


def export(options) -> None:
    from .export.formats import quantising_costs
    from .export.write import export as write
    from .models import load_model, load_tokenizer
    from .report.summary import card_facts
    from .stages.inputs import latest_student

    root = _run_folder(options.run)
    student = latest_student(root)
    # Not in the export stage's own folder: its records vouch for what is there.
    target = Path(options.out) if options.out else root / "exports" / f"{options.format}-{options.dtype}"
    model, tokenizer = cast("HybridForCausalLM", load_model(student)), load_tokenizer(student)
    figures = write(model, tokenizer, target, options.format, options.dtype, card_facts(root))
    costs = quantising_costs(figures)
    print(
        f"{target}: the {student.parent.name} stage's student; logits differ by {figures['logits']:.1e}, "
        f"decoding by {figures['decode']:.1e}" + (f"; {costs}" if costs else "")
    )


def evaluate(options) -> None:
    import torch

    from ..teachers import load_teacher
    from .config import Recipe, load_recipe
    from .data.corpus import tokenize_corpus
    from .data.packed import PackedDataset
    from .data.rows import check_tokens
    from .errors import RunError
    from .export.card import quality_row
    from .measure.held_out import HeldOut
    from .measure.measures import Measuring, check_measures, held_out_texts
    from .models import embedding_rows, load_model, load_tokenizer, on_device
    from .report.summary import beside_table, quality_table
    from .run.files import write_json

    path, device = _model_folder(options.model), _device()
    run = Path(options.model) / "recipe.yaml"
    # `--text` takes all the words that follow it.
    text, overrides = options.text or [], list(options.overrides)
    sections = "|".join(Recipe.__dataclass_fields__)
    overrides += [word for word in text if re.match(rf"({sections})\.\w+=", word)]
    if others := [word for word in overrides if not word.startswith(("evaluate.", "data."))]:
        raise RunError(f"eval reads settings of evaluate and data alone: leave out {' '.join(others)}")
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise RunError(f"there is no folder for '{options.json}': make it, or name another place")
    recipe = load_recipe(run if run.is_file() else None, overrides)  # of a run: as it measured
    recipe.data.heldout = [word for word in text if word not in overrides] or recipe.data.heldout
    recipe.data.length = options.length or recipe.data.length
    recipe.evaluate.sequences = options.sequences or recipe.evaluate.sequences
    data = recipe.data
    if not data.heldout:
        raise RunError("there is no text to measure on: name some with --text")
    teacher = None
    if options.teacher:
        revision = recipe.teacher.revision if options.teacher == recipe.teacher.source else None  # of a run: as it was
        teacher, tokenizer = load_teacher(
            options.teacher, device=device, trust_remote_code=options.trust_remote_code, revision=revision
        )
    own = load_tokenizer(path, options.trust_remote_code)
    tokenizer = tokenizer if teacher else own
    with _saying_warnings():
        model = on_device(load_model(path, "float32", options.trust_remote_code, options.trans_points), device)

    def tokens(tokenizer, sources: list[str]) -> "Corpus":
        return tokenize_corpus(
            sources,
            tokenizer,
            text_field=data.text_field,
            messages_field=data.messages_field,
            bos=data.bos,
            max_tokens=data.max_heldout_tokens,
        )

    corpus = tokens(tokenizer, data.heldout)
    if teacher is not None and not torch.equal(corpus.tokens, tokens(own, data.heldout).tokens):
        raise RunError(
            f"'{options.model}' has another tokenizer than its teacher: on this text they give other tokens, and a KL "
            "between predictions of different tokens means nothing; leave out --teacher to measure it alone"
        )
    models = {"teacher": teacher, "student": model} if teacher is not None else {"student": model}
    for one in models.values():
        check_tokens(corpus.tokens, embedding_rows(one), tokenizer, ", ".join(corpus.sources))
    data.length = min(data.length, len(corpus.tokens))
    whole = PackedDataset(corpus, data.length)
    texts = held_out_texts(recipe, whole, lambda source: tokens(tokenizer, [source]), print)
    check_measures(recipe, whole, tokenizer)
    measuring = Measuring(recipe, tokenizer, whole, texts, teacher, model, print)
    held_out = HeldOut(whole, recipe.evaluate.sequences, tokenizer, teacher)
    quality = {name: held_out.measure(one) for name, one in models.items()}
    measures = {name: measuring(one) for name, one in models.items()}
    called = {name: "teacher" if name == "teacher" else options.model for name in models}
    rows = [quality_row(called[name], found) for name, found in quality.items()]
    console_of().print(quality_table(rows, corpus.summary()))
    if (beside := beside_table(measures, called)).rows:
        console_of().print(beside)
    if options.json:
        write_json(Path(options.json), {"quality": quality, "measures": measures})


def generate(options) -> None:
    from .measure.answers import answer
    from .models import load_model, load_tokenizer, on_device

    path = _model_folder(options.model)
    with _saying_warnings():
        model = on_device(load_model(path, "auto", options.trust_remote_code, options.trans_points), _device())
    tokenizer = load_tokenizer(path, options.trust_remote_code)
    print(answer(model, tokenizer, options.prompt, options.max_new_tokens))


def compare(options) -> None:
    from .compare import compare as run_all, load_recipes
    from .report.comparison import as_markdown, check_drawing, draw, rows_of

    overrides = [word for word in options.recipes if "=" in word] + options.overrides
    paths = [word for word in options.recipes if "=" not in word]
    if not paths:
        raise DistillError("there is no recipe to compare: name some YAML files")
    check_drawing()
    out = Path(options.out)
    found, writes = run_all(load_recipes(paths, overrides, options.base, options.tokens), out, options.seeds)
    if found.runs and writes:
        head, *rows = rows_of(found)
        table = Table(*map(escape, head), title=f"at {found.tokens:,} training tokens")
        for row in rows:
            table.add_row(*map(escape, row))
        console_of().print(table)
        (out / "comparison.md").write_text(as_markdown(found), encoding="utf-8")
        print(f"{out}/comparison.json and .md, and {draw(found, out / 'comparison.svg')}")
    if found.failed:
        raise DistillError("; ".join(f"{name} failed: {reason}" for name, reason in found.failed.items()))


def figure(options) -> None:
    import math

    from ..students import plan_student
    from ..students.modeling.configuration_transmamba import fixed_point
    from .config import load_recipe
    from .models import load_config, teacher_of
    from .report.figure import draw
    from .stages.select import as_far_as_known

    path = _model_folder(options.model)
    if Path(path).is_file():
        recipe = load_recipe(path)
        teacher, _ = teacher_of(recipe)
        student, not_yet = as_far_as_known(recipe, teacher.config.num_hidden_layers)
        if not_yet is not None:
            print(not_yet)
        config = plan_student(teacher, student)[0].config
    else:
        config = load_config(path)
    points = config.trans_points or [None] * len(config.mixers)
    points = [fixed_point(mixer, point) for mixer, point in zip(config.mixers, points, strict=True)]
    points = [math.inf if point == "inf" else point for point in points]
    print(draw(config.mixers, points, options.out, options.tokens))


def cache_teacher(options) -> None:
    from .data.teacher_cache import cache_teacher as write, describe
    from .stages.session import Session

    session = Session(_with_teacher(options))
    index = write(
        session.recipe,
        session.teacher,
        cast("PackedDataset", session.text_of("distill")),  # a recipe with a cache does not stream
        session.accelerator,
        session.console,
        session.precision,
    )
    session.say(f"{session.recipe.distill.teacher_cache}: {describe(index)}")


def report(options) -> None:
    from .report.page import write_report

    print(write_report(Path(options.run), Path(options.out) if options.out else None))


def synthesize(options) -> None:
    from .data.synthesize import describe, synthesize as sample
    from .stages.session import Session

    session = Session(_with_teacher(options))
    recipe = session.recipe
    record = sample(recipe, session.teacher, session.tokenizer, session.accelerator, session.console)
    session.say(describe(recipe.synthesize.out or Path(recipe.run.dir) / "synthetic", record))


def tasks(options) -> None:
    from .report.comparison import check_drawing
    from .report.tasks import as_markdown, draw, draw_memory, rows_of
    from .tasks.config import load_grid
    from .tasks.grid import run_grid

    check_drawing()
    grid = load_grid(options.config, options.overrides)
    found, out = run_grid(grid, options.seeds), Path(grid.config.run.dir)
    head, *rows = rows_of(found)
    table = Table(*map(escape, head), title=escape(str(out)))
    for row in rows:
        table.add_row(*map(escape, row))
    console_of().print(table)
    (out / "tasks.md").write_text(as_markdown(found), encoding="utf-8")
    drawn = [draw(found, out / "tasks.svg"), draw_memory(found, out / "memory.svg")]
    print(f"{out}/tasks.json and .md, {' and '.join(str(path) for path in drawn if path)}")
    if found.failed:
        raise DistillError("; ".join(f"{name} failed: {reason}" for name, reason in found.failed.items()))


def probe(options) -> None:
    from .report.probe import othello_rows, write_model_page, write_othello_page
    from .run.files import write_json

    console = console_of()
    if options.model == "othello":
        from .probe.board import othello, settings_of

        settings = settings_of(options.overrides)
        out = Path(options.out or f"runs/othello-{settings.mixer}")
        found = othello(settings, out, console)
        table = Table("read off", "all squares", "discs")
        for row in othello_rows(found):
            table.add_row(*row)
        console.print(table)
        page = write_othello_page(found, out / "probe.html")
    else:
        out = Path(options.out or Path(options.model) / "probe")
        found = _probed(options)
        out.mkdir(parents=True, exist_ok=True)
        page = write_model_page(found, out / "probe.html")
    write_json(out / "probe.json", found)
    print(f"{page} and .json")


def _probed(options) -> dict:
    """What probes find of a model on text."""
    import torch

    from ..teachers import load_teacher
    from .config import load_recipe
    from .data.corpus import tokenize_corpus
    from .errors import RunError
    from .models import load_model, load_tokenizer, on_device
    from .probe.model import probe_model, rows_of

    if options.overrides:
        raise RunError(f"only othello has settings: leave out {' '.join(options.overrides)}")
    path, run = _model_folder(options.model), Path(options.model) / "recipe.yaml"
    text = options.text or (load_recipe(run, []).data.heldout if run.is_file() else None)
    if not text:
        raise RunError("there is no text to probe on: name some with --text")
    model, tokenizer = on_device(load_model(path, "float32"), _device()), load_tokenizer(path)
    teacher, tokens = None, tokenize_corpus(text, tokenizer).tokens
    if options.teacher:
        teacher, own = load_teacher(options.teacher, device=_device())
        if not torch.equal(tokenize_corpus(text, own).tokens, tokens):
            raise RunError(f"'{options.model}' has another tokenizer than its teacher: leave out --teacher")
    return probe_model(model, rows_of(tokens, options.length, options.sequences), options.model, teacher)


def push(options) -> None:
    from .export.formats import has_model
    from .export.hub import push as upload

    run = None if has_model(Path(options.run)) else Path(options.run)
    print(upload(_export_folder(options.run), options.repo_id, private=options.private, run=run))


def keys(options) -> None:
    from .config import describe_keys

    table = Table("key", "default", "what it is")
    for row in describe_keys():
        table.add_row(*map(escape, row))
    console_of().print(table)


COMMANDS = {
    "init": init,
    "run": run,
    "plan": plan,
    "status": status,
    "export": export,
    "eval": evaluate,
    "generate": generate,
    "compare": compare,
    "figure": figure,
    "report": report,
    "probe": probe,
    "cache-teacher": cache_teacher,
    "synthesize": synthesize,
    "tasks": tasks,
    "push": push,
    "keys": keys,
}


LIGHT = ("init", "status", "report", "keys")  # which answer at once, without torch
# Which take long enough to look at what else is at work.
TRAINING = ("run", "compare", "cache-teacher", "synthesize", "tasks")
TRAINING = (
    "run",
    "compare",
    "probe",
    "cache-teacher",
    "synthesize",
)  # which take long enough to look at what else is at work


def _version() -> str:
    try:
        return version("transpoint")
    except PackageNotFoundError:  # run from its folders, as they lie
        return "(not installed)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transpoint",
        description="Turn a pretrained Transformer into a Mamba hybrid: transfer, calibrate, align, distill, export.",
    )
    parser.add_argument("--version", action="version", version=f"transpoint {_version()}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[common])

    def recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="a YAML recipe; `transpoint keys` lists what it may hold")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, as align.steps=100")

    def trans_points(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--trans-points",
            metavar="SPEC",
            type=_spec,
            help="another schedule of TransPoints, as student.trans_points takes it (default: the model's own)",
        )

    sub = command("init", "write a recipe to begin from, a copy of one that comes with the package, and its text")
    sub.add_argument("config", metavar="FILE", help="the recipe to write, as my-recipe.yaml")
    known = shipped() | shipped(tasks=True)
    sub.add_argument(
        "--like",
        choices=known,
        default="smollm2-135m",
        metavar="NAME",
        help=f"one of {', '.join(known)}; default: the demo",
    )

    sub = command("run", "run the stages of a recipe; what is done and unchanged is reused")
    recipe(sub)
    sub.add_argument(
        "--from",
        dest="from_stage",
        choices=names(),
        metavar="STAGE",
        help="run from this stage on, done or not",
    )
    sub.add_argument("--until", choices=names(), metavar="STAGE", help="stop after this stage")

    recipe(command("plan", "show the layer plan, the transfer plan, parameters and cache; nothing is trained"))

    sub = command("status", "show which stages of a run are done, and what would run and why")
    sub.add_argument("run", metavar="RUN", help="a run folder")

    sub = command("export", "write the latest student of a run in a format others load, and verify it")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--format", choices=FORMATS, default="native", help="default: native")
    sub.add_argument(
        "--dtype", choices=(*DTYPES, *QUANTISED), default="float32", help="default: float32; q8_0: of gguf alone"
    )
    sub.add_argument("--out", metavar="FOLDER", help="default: RUN/exports/FORMAT-DTYPE")

    sub = command("eval", "measure a model on held-out text, against its teacher if one is given")
    sub.add_argument("model", metavar="MODEL", help="an exported folder, a run folder, or a hub id")
    sub.add_argument("--teacher", metavar="T", help="registry name, hub id, folder or .gguf file")
    sub.add_argument(
        "--text", nargs="+", metavar="SOURCE", help="held-out text, as data.heldout takes it (default: that of the run)"
    )
    sub.add_argument("--length", type=_count, help="tokens a sequence (default: that of the run, or 1024)")
    sub.add_argument("--sequences", type=_count, help="at most so many sequences (default: those of the run, or 16)")
    sub.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="evaluate.recall_lengths=[512,2048]")
    sub.add_argument("--json", metavar="FILE", help="where to write all figures")
    trans_points(sub)
    sub.add_argument("--trust-remote-code", action="store_true", help="let code that travels with the model run")

    sub = command("generate", "answer a prompt (as a chat where the model has a chat template)")
    sub.add_argument("model", metavar="MODEL", help="an exported folder, a run folder, or a hub id")
    sub.add_argument("prompt", metavar="PROMPT")
    sub.add_argument("--max-new-tokens", type=_count, default=128, help="default: 128")
    trans_points(sub)
    sub.add_argument("--trust-remote-code", action="store_true", help="let code that travels with the model run")

    sub = command("compare", "run several recipes at equal tokens; a table and a plot of quality against tokens")
    sub.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML recipes, and key=value changes to all of them")
    sub.add_argument("--base", metavar="FILE", help="a recipe that all stand on: teacher, text, lengths")
    sub.add_argument("--tokens", type=_count, help="training tokens of each; its stages keep their proportions")
    sub.add_argument(
        "--seeds", type=_count, default=1, help="runs of each, with as many seeds from run.seed on (default: 1)"
    )
    sub.add_argument("--out", metavar="FOLDER", default="runs/comparison", help="default: runs/comparison")
    sub.set_defaults(overrides=[])

    sub = command("figure", "draw which token is computed by what in which layer, as SVG, PNG or PDF")
    sub.add_argument("model", metavar="MODEL", help="a recipe, an exported folder, or a run folder")
    sub.add_argument("--out", required=True, metavar="FILE", help="its ending says the format")
    sub.add_argument("--tokens", type=_count, help="tokens along the axis (default: twice the last TransPoint)")

    recipe(command("cache-teacher", "write the teacher's predictions on the training text, for distill to read"))

    sub = command("report", "write one HTML page of a run: plan, curves, quality, answers, speed; finished or not")
    sub.add_argument("run", metavar="RUN", help="a run folder")
    sub.add_argument("--out", metavar="FILE", help="default: RUN/report.html")

    sub = command("probe", "look into a model: predictions by layer, states by head, what is left of earlier tokens")
    sub.add_argument(
        "model", metavar="MODEL", help="a run folder, an exported folder, or a hub id; or othello, to train"
    )
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of othello: mixer=attention steps=300")
    sub.add_argument("--teacher", metavar="T", help="registry name, hub id, folder or .gguf file, to look at beside it")
    sub.add_argument("--text", nargs="+", metavar="SOURCE", help="as data.heldout takes it (default: that of the run)")
    sub.add_argument("--length", type=_count, default=128, help="tokens a sequence (default: 128)")
    sub.add_argument("--sequences", type=_count, default=64, help="at most so many sequences (default: 64)")
    sub.add_argument("--out", metavar="FOLDER", help="default: MODEL/probe, runs/othello-MIXER")

    recipe(
        command("synthesize", "sample text from the teacher itself, with seed and settings recorded, for data.train")
    )

    sub = command("tasks", "train small models of each architecture on each task; a table and plots of who can do what")
    sub.add_argument("config", metavar="CONFIG", help="a YAML file of tasks and architectures, as configs/tasks.yaml")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, as train.steps=100")
    sub.add_argument(
        "--seeds", type=_count, default=1, help="trainings of each, with as many seeds from run.seed on (default: 1)"
    )

    sub = command(
        "push",
        "upload the export of a run, its report and results to the hub (first `hf auth login`, or set HF_TOKEN)",
    )
    sub.add_argument("run", metavar="RUN", help="a run folder, or an exported folder")
    sub.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME")
    sub.add_argument("--private", action="store_true", help="make the repository private if it is new")

    command("keys", "list every key of a recipe with its default and what it is")
    return parser


def _with_teacher(options) -> "Recipe":
    """The recipe of a command that asks a teacher. Raises RunError where there is none."""
    from .config import load_recipe
    from .errors import RunError

    recipe = load_recipe(options.config, options.overrides)
    if recipe.from_scratch:
        raise RunError(f"teacher.source '{recipe.teacher.source}' is an untrained model: it has nothing to say")
    return recipe


def _run_folder(path: str) -> Path:
    from .errors import RunError

    if not (Path(path) / "recipe.yaml").is_file():
        raise RunError(f"'{path}' is no run folder: it has no recipe.yaml")
    return Path(path)


def _export_folder(path: str) -> Path:
    """An exported folder, or the one a run's export stage wrote."""
    from .errors import RunError
    from .export.formats import has_model
    from .stages.inputs import lineage

    if has_model(Path(path)):
        return Path(path)
    root = _run_folder(path)
    if (done := lineage(root).get("export")) and done.folder:
        return root / "export" / done.folder
    raise RunError(
        f"'{path}' has no finished export: `transpoint run {root / 'recipe.yaml'}` makes one; "
        "or name the folder that `transpoint export` wrote"
    )


def _model_folder(path: str) -> str | Path:
    """What to load for MODEL: a run's latest student, a folder, or a hub id as it is."""
    from .stages.inputs import latest_student

    return latest_student(Path(path)) if (Path(path) / "recipe.yaml").is_file() else path


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _spec(text: str):
    """A schedule of TransPoints: a number, a list, or a name."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no schedule") from error


# What libraries warn of that is so by design, by words of the message; everything else they warn of is said.
_BY_DESIGN = (
    "is falling back to its reference PyTorch implementation",  # native exports are measured without fused kernels
)


def _by_design(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _BY_DESIGN)


def _quiet_libraries(debug: bool, loading: bool) -> None:
    """Our own progress is what a person should see, and what libraries warn of, but what is so by design.

    loading: whether they are loaded in any case.
    """
    if debug:
        logging.basicConfig(level=logging.DEBUG)
        return
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not loading:
        return
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU

    transformers.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_by_design)


@contextmanager
def _saying_warnings():
    """What is warned of meanwhile, in one line each: how a schedule does that the student was not trained on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"transpoint: warning: {warning.message}", file=sys.stderr)


def _complain(message: str) -> None:
    print(f"transpoint: error: {message}", file=sys.stderr)
