"""The page of a run: what was trained, how it went and what came of it, in one HTML file that loads nothing.

It reads the records in the run folder and no model, and shows what there is: of runs that are not finished, of runs
made by earlier versions, of runs some of whose records are damaged.
"""

import json
import math
import os
import re
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...students.modeling.configuration_mixers import have_trans_points
from ...teachers.names import is_scratch
from ..config import SafeLoader
from ..errors import RunError
from ..export.card import kinds_in, quality_row
from ..measure.figures import rows_beside
from ..run.files import read_json, written_whole
from ..run.folder import StageFolder
from ..run.records import Cost, Quality, Recall, StageRecord, number, read_record
from ..stages.inputs import lineage
from ..stages.pipeline import names
from ..stages.train import TRAIN
from .charts import heat_map, layer_bars, line_chart, loss_chart
from .seconds import seconds_table

DEPTHS = 4  # parts of a text, in maps of recall
EVENTS = 200  # shown in the table
# Figures in a line of metrics.jsonl that are no part of the loss.
_OTHER = re.compile(
    r"(layer|attention)_\d+|attention|step|loss|lr.*|gradient_norm|tokens.*|mfu|memory.*|seconds|skipped"
)


def write_report(root: Path, out: Path | None = None, recipe: str | None = None) -> Path:
    """Writes the page of the run folder `root` to `out` (RUN/report.html), and returns where it is.

    recipe: the text that it shows as the run's recipe, if not the run's own.

    Raises:
        RunError: `root` is no run folder, matplotlib is missing, or `out` cannot be written.
    """
    if not (root / "recipe.yaml").is_file():
        raise RunError(f"'{root}' is no run folder: it has no recipe.yaml")
    out = out or root / "report.html"
    return render("page.html.jinja", _contents(root, recipe), out)


def render(template: str, contents: dict, out: Path) -> Path:
    """Writes a page from a template of this folder; it is whole or not there. Raises RunError where it cannot be."""
    page = _environment().get_template(template).render(contents)
    try:
        with written_whole(out, errors="replace") as file:
            file.write(page)
    except OSError as error:
        raise RunError(f"the report cannot be written to '{out}': {error.strerror or error}") from error
    return out


@lru_cache
def _environment() -> Environment:
    """Which keeps the templates that it has compiled."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    environment.filters |= {
        "fixed": _fixed,
        "significant": _significant,
        "perplexity": _perplexity,
        "percent": _percent,
        "count": _count,
        "short": _short,
        "duration": _duration,
    }
    return environment


class _Stage:
    """The records of a stage, each empty where it is missing or damaged."""

    def __init__(self, root: Path, name: str, current: dict[str, StageRecord], recipe: Any):
        folder, trained = StageFolder(root, name), names(lambda stage: stage.trains)
        self.name, self.record = name, folder.record
        self.lines, self.damaged = _read_metrics(folder / "metrics.jsonl") if name in trained else ([], 0)
        self.steps = _get(recipe, name, "steps") if name in trained else None
        self.last = self.lines[-1]["step"] if self.lines else 0
        if name in current:
            self.state, self.words = "done", "done"
        elif folder.done:
            self.state, self.words = "earlier", "of earlier settings"
        elif folder.started is not None or self.lines:
            self.state, self.words = "unfinished", f"at step {self.last:,}" if self.lines else "unfinished"
            if self.lines and isinstance(self.steps, int):
                self.words += f" of {self.steps:,}"
        else:
            self.state, self.words = "missing", "not run"

    @property
    def tokens(self) -> int | None:
        return self.record.training.tokens if self.record.training is not None else None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a figure, where it is a finite number."""
        pairs = [(line["step"], value) for line in self.lines if (value := number(line.get(key))) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def keys(self) -> list[str]:
        """All names of figures, in the order in which they first come."""
        return list(dict.fromkeys(key for line in self.lines for key in line))


@dataclass(frozen=True)
class _Plan:
    """What a student's config says of its layers."""

    mixers: list[str] = field(default_factory=list)
    trans_points: list = field(default_factory=list)


def _contents(root: Path, text: str | None) -> dict:
    """What the template shows; `text`: of the recipe, if not the run's own."""
    text = (root / "recipe.yaml").read_text(encoding="utf-8", errors="replace") if text is None else text
    try:
        recipe = yaml.load(text, SafeLoader)
    except yaml.YAMLError:
        recipe = {}
    source = _get(recipe, "teacher", "source")
    scratch = isinstance(source, str) and is_scratch(source)
    current = lineage(root)
    own = names(lambda stage: not stage.needs_teacher if scratch else stage is not TRAIN)
    stages = {name: _Stage(root, name, current, recipe) for name in own}
    results = read_record(StageRecord, read_json(root / "evaluate" / "results.json") if "evaluate" in current else None)
    quality, damaged = _quality(root, current, results), [stage.name for stage in stages.values() if stage.damaged]
    layers = _layers(root, stages, results)
    events = [event for stage in stages.values() for event in _events(stage)]
    seconds = seconds_table(root, current)
    return {
        "name": root.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "finished": max((s.record.finished for s in stages.values() if s.record.finished), default=None),
        "teacher": None if scratch else _readable(source or "unknown teacher"),
        "student": _student_in_words(layers),
        "stages": list(stages.values()),
        "settings": _settings(recipe, [name for name, stage in stages.items() if stage.steps is not None]),
        "layers": layers,
        "kinds": list(dict.fromkeys((cell["kind"], cell["words"]) for cell in layers)),
        "quality": quality,
        "teacher_quality": next((row for row in quality if row["model"] == "teacher"), None),
        "best": next((row for row in reversed(quality) if row["model"] != "teacher"), None),
        "trained_tokens": sum(stage.tokens or 0 for stage in stages.values()) or None,
        "selection": _selection(current.get("select", StageRecord()), layers),
        "measures": rows_beside(results.measures),
        "recall": [part for part in map(_recall_map, _recall_tasks(results)) if part],
        "schedules": _schedules(results),
        "training": [part for stage in stages.values() if (part := _training(stage))],
        "answers": [{name: _readable(text) for name, text in asdict(answer).items()} for answer in results.answers],
        "speed": _speed([stage for stage in stages.values() if stage.lines or stage.state in ("done", "earlier")]),
        "seconds": seconds and replace(seconds, notes=list(map(_readable, seconds.notes))),
        "speed_charts": _speed_charts([stage for stage in stages.values() if stage.lines]),
        "events": events[:EVENTS],
        "more_events": len(events) - EVENTS,
        "damaged": [(name, stages[name].damaged) for name in damaged],
        "recipe": _readable(text),
    }


# Records


def _read_metrics(path: Path) -> tuple[list[dict], int]:
    """The lines of a log by step, the last one of each step; and how many are damaged."""
    found: dict[int, dict] = {}
    damaged = 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0
    for line in text.splitlines():
        try:
            record = json.loads(line)
            found[int(record["step"])] = {**record, "step": int(record["step"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            damaged += bool(line.strip())
    return [found[step] for step in sorted(found)], damaged


def _quality(root: Path, current: dict[str, StageRecord], results: StageRecord) -> list[dict]:
    """Rows of held-out quality: the teacher, each stage's student, the exported checkpoint."""
    teacher = read_json(root / "teacher_quality.json")
    rows = {"teacher": read_record(Quality, teacher) if isinstance(teacher, dict) else None}
    rows |= {f"after {stage}": record.quality for stage, record in current.items() if stage != "evaluate"}
    rows["exported checkpoint"] = results.quality or current.get("evaluate", StageRecord()).quality
    return [quality_row(model, quality) for model, quality in rows.items() if quality is not None]


def _layers(root: Path, stages: dict[str, _Stage], results: StageRecord) -> list[dict]:
    """For each layer {"kind", "words", "point", "share"}: its mixer, its TransPoint in words (None where it has none),
    and how much of a cell that is, in percent."""
    students = [_Plan(), *(read_record(_Plan, read_json(root / name / "student" / "config.json")) for name in names())]
    mixers = stages["transfer"].record.mixers or next((plan.mixers for plan in reversed(students) if plan.mixers), [])
    measured = [record.trans_points for record in results.schedules[:1]]
    found = [points for points in [*(plan.trans_points for plan in students), *measured] if points]
    points = found[-1] if found and len(found[-1]) == len(mixers) else [None] * len(mixers)
    finite = [value for point in points if (value := number(point)) is not None]
    cells = []
    for kind, point in zip(mixers, points, strict=True):
        share, words = {"attention": 100.0}.get(kind, 0.0), None
        if have_trans_points([kind]) and point is not None:
            tokens = number(point)
            words = "∞" if tokens is None else f"{tokens:,.0f}"
            # Logarithmic, as TransPoints are.
            share = 100.0 if tokens is None else 92 * math.log1p(max(tokens, 0)) / math.log1p(max(1, *finite, 1))
        cells.append(
            {"kind": kind, "words": kinds_in([kind]).get(kind, kind), "point": words, "share": round(share, 1)}
        )
    return cells


def _selection(record: StageRecord, layers: list[dict]) -> Markup | None:
    """What each layer's attention is worth, as `select` found it."""
    scores = record.selection.alone if record.selection is not None else {}
    found = [scores.get(str(layer)) for layer in range(len(scores))]
    if not found or None in found:
        return None
    kept = {index for index, cell in enumerate(layers) if cell["kind"] == "attention"}
    panels = {
        "KL": [number(score.kl) for score in found if score],
        "recall lost": [number(score.recall) for score in found if score],
    }
    worst = max(range(len(found)), key=lambda layer: panels["recall lost"][layer] or 0.0)
    label = f"what the teacher loses without the attention of each layer; in recall most without that of layer {worst}"
    return Markup(layer_bars("selection", panels, kept, label))


def _recall_tasks(results: StageRecord) -> list[tuple[str, dict[str, list[Recall]]]]:
    """By task, the records of each model that know where in a text the answers stood."""
    found: dict[str, dict[str, list[Recall]]] = {}
    for model, measures in results.measures.items():
        for record in measures.recall:
            if record.depths and len(record.depths) == len(record.right) and record.length:
                found.setdefault(record.task, {}).setdefault(model, []).append(record)
    return list(found.items())


def _recall_map(task: tuple[str, dict[str, list[Recall]]]) -> dict | None:
    """Fractions of answers given, by depth in the text (rows) and its length (columns), of each model."""
    name, models = task
    lengths = sorted({cast(int, record.length) for records in models.values() for record in records})
    shown = [model for model in ("teacher", "student") if model in models]
    if "student" not in shown:
        return None
    rows = []
    for low in range(0, 100, 100 // DEPTHS):
        cells = []
        for model in shown:
            by_length = {record.length: record for record in models[model]}
            for length in lengths:
                one = by_length.get(length, Recall())
                here = [
                    right
                    for depth, right in zip(one.depths, one.right, strict=True)
                    if low <= 100 * depth < low + 100 // DEPTHS
                ]
                cells.append(round(100 * sum(here) / len(here)) if here else None)
        rows.append({"depth": f"{low} to {low + 100 // DEPTHS} %", "cells": cells})
    return {"task": name, "models": shown, "lengths": lengths, "rows": rows}


def _student_in_words(layers: list[dict]) -> str | None:
    """`10 of 30 layers are Mamba-2`."""
    kinds = [cell["words"] for cell in layers if cell["kind"] != "attention"]
    counts = [f"{kinds.count(words)} of {len(layers)} layers are {words}" for words in dict.fromkeys(kinds)]
    return ", ".join(counts) or None


def _settings(recipe: Any, training: list[str]) -> list[tuple[str, str]]:
    """What matters most, by name; training: the stages that train."""

    def of(*keys: str) -> str | None:
        value = _get(recipe, *keys)
        return None if value is None else _readable(str(value))

    found = [
        ("sequence length", of("data", "length") and f"{of('data', 'length')} tokens"),
        ("training text", _base_names(_get(recipe, "data", "train"))),
        ("held-out text", _base_names(_get(recipe, "data", "heldout"))),
    ]
    for stage in training:
        steps, batch, lr = (of(stage, key) for key in ("steps", "batch_size", "lr"))
        if steps is not None:
            found.append((stage, f"{steps} steps of {batch} sequences, learning rate {lr}"))
    found += [
        ("weights" if is_scratch(of("teacher", "source") or "") else "teacher's weights", of("teacher", "dtype")),
        ("matrix products", of("run", "precision")),
        ("seed", of("run", "seed")),
        ("export", of("export", "format") and f"{of('export', 'format')}, {of('export', 'dtype')}"),
    ]
    return [(name, value) for name, value in found if value]


def _schedules(results: StageRecord) -> dict | None:
    """The table of TransPoint schedules, as numbers, and on what its costs were measured."""
    rows = []
    for record in results.schedules:
        if record.quality is not None:
            cost = record.cost or Cost()
            row = {
                "name": _readable(record.schedule),
                "trained": record.trained,
                **asdict(record.quality),
                **asdict(cost),
            }
            rows.append(row | {"where": f"{cost.dtype} on {cost.device}"})
    return {"rows": rows, **{name: rows[0][name] for name in ("late", "length", "where")}} if rows else None


def _events(stage: _Stage) -> list[dict]:
    """What lines of the log say besides figures."""
    found = []
    for line in stage.lines:
        texts = []
        if count := number(line.get("skipped")):
            texts.append(f"{count:.0f} step{'s' if count > 1 else ''} skipped: the gradient was not finite")
        if event := line.get("event"):
            texts.append(_readable(str(event)))
        loss = line.get("loss")
        if isinstance(loss, float) and not math.isfinite(loss):
            texts.append("the loss was not finite")
        found += [{"stage": stage.name, "step": line["step"], "text": text, "loss": number(loss)} for text in texts]
    return found


# Charts


def _training(stage: _Stage) -> dict | None:
    """The charts of a training stage."""
    steps, losses = stage.series("loss")
    if not steps:
        return None
    name, keys = stage.name, stage.keys()
    below: dict[str, dict] = {}
    for title, chosen in (
        ("parts", [key for key in keys if not _OTHER.fullmatch(key)]),
        ("gradient", ["gradient_norm"]),
        ("attention", ["attention"]),
        ("lr", [key for key in keys if key.startswith("lr")]),
    ):
        curves = {key.removeprefix("lr").strip("_/. "): stage.series(key) for key in chosen}
        if curves := {key: series for key, series in curves.items() if series[1] and series[1] != losses}:
            below[title] = curves
    marks = {
        "skipped steps": [line["step"] for line in stage.lines if line.get("skipped")],
        "event": [line["step"] for line in stage.lines if line.get("event")],
    }
    described = f"loss of {name} over {stage.last:,} steps, from {losses[0]:.4g} to {losses[-1]:.4g}"
    marks = {what: places for what, places in marks.items() if places}
    chart = loss_chart(f"loss-{name}", (steps, losses), below, marks, described)
    maps = []
    for prefix, form in (("layer", "state-space form"), ("attention", "attention form")):
        rows = {int(key.split("_")[1]): key for key in keys if re.fullmatch(rf"{prefix}_\d+", key)}
        if not rows:
            continue
        values = {
            layer: [math.nan if (v := number(line.get(key))) is None else v for line in stage.lines]
            for layer, key in rows.items()
        }
        known = {layer: [v for v in row if not math.isnan(v)] for layer, row in values.items()}
        ends = {layer: row[-1] for layer, row in known.items() if row}
        if not ends:
            continue
        worst = sorted(ends, key=ends.__getitem__, reverse=True)[:3]
        title = "alignment of each layer" + (f", {form}" if any(key.startswith("attention_") for key in keys) else "")
        described = f"{title}, over {stage.last:,} steps; largest at the end: " + ", ".join(
            f"layer {layer} ({ends[layer]:.3g})" for layer in worst
        )
        picture = heat_map(f"heat-{name}-{prefix}", [line["step"] for line in stage.lines], values, described)
        maps.append({"title": title, "svg": Markup(picture), "worst": [(layer, ends[layer]) for layer in worst]})
    return {"name": name, "words": stage.words, "state": stage.state, "svg": Markup(chart), "maps": maps}


def _speed(stages: list[_Stage]) -> list[dict]:
    """Rows: tokens, seconds and speed of each stage."""
    rows = []
    for stage in stages:
        # The first line is of the step that compiles.
        speeds, used = (stage.series(key)[1] for key in ("tokens_per_second", "mfu"))
        rows.append(
            {
                "stage": stage.name,
                "seconds": stage.record.stage_seconds,
                "tokens": stage.tokens if stage.tokens is not None else next(reversed(stage.series("tokens")[1]), None),
                "speed": statistics.median(speeds[1:] or speeds) if speeds else None,
                "mfu": statistics.median(used[1:] or used) if used else None,
                "memory": max(stage.series("memory")[1], default=None),
            }
        )
    return rows


def _speed_charts(stages: list[_Stage]) -> list[dict]:
    found = []
    for key, title, unit, scale in (
        ("tokens_per_second", "tokens a second", "tokens/s", 1),
        ("mfu", "model FLOP utilisation", "%", 100),
        ("memory", "peak memory of a device", "GiB", 2**-30),
    ):
        lines = {stage.name: stage.series(key) for stage in stages}
        lines = {name: (steps, [scale * v for v in values]) for name, (steps, values) in lines.items() if values}
        if lines:
            last = ", ".join(f"{name} {_significant(values[-1])} {unit}" for name, (_, values) in lines.items())
            svg = line_chart(f"speed-{key}", lines, unit, f"{title} over the steps; last: {last}")
            found.append({"title": title, "svg": Markup(svg)})
    return found


def _get(record: Any, *keys: str) -> Any:
    """What is under these keys of a recipe, which people write; None where there is nothing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _base_names(sources: Any) -> str:
    texts = map(str, sources if isinstance(sources, list) else [])
    return _readable(
        ", ".join(text if text.startswith("hub:") else os.path.basename(text.rstrip("/")) or text for text in texts)
    )


def _readable(text: str) -> str:
    """Without control characters, which no page can hold."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\uffff\U00010000-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", text)


# Filters: None becomes a dash


def _fixed(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e9 else f"{value:.2e}"


def _perplexity(value: float | None) -> str:
    return _fixed(value, 2 if value is not None and value < 1000 else 0)


def _significant(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if number(value) is None else f"{100 * cast(float, value):.1f} %"


def _count(value: float | None) -> str:
    return "–" if number(value) is None else f"{value:,.0f}"


def _short(value: float) -> str:
    """`1.31 B`, `917 M`, `640 k`."""
    for size, suffix in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}" if value < 999.5 * size else f"{value / size:,.0f}{suffix}"
    return f"{value:.0f}"


def _duration(seconds: float | None) -> str:
    """`8 s`, `3 min 20 s`, `5 h 12 min`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
