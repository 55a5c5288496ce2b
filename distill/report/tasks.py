"""Which architecture can do which task: a table, a plot, and a plot of recall against what a model remembers.

Plots are drawn by matplotlib, an optional dependency: `pip install 'transpoint[figure]'`.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

from ..errors import RunError
from ..tasks.grid import Outcome, Outcomes
from .comparison import COLOURS


def rows_of(found: Outcomes) -> list[list[str]]:
    """A head (task, figure, architectures) and a row for each task and each of its parts: means over seeds, and where
    there are several their standard deviation."""
    names = list(dict.fromkeys(run.architecture for run in found.runs))
    rows = []
    for task in dict.fromkeys(run.task for run in found.runs):
        runs = [run for run in found.runs if run.task == task]
        rows.append([task, runs[0].figure, *(_cell(run.value for run in _of(runs, name)) for name in names)])
        for part in runs[0].parts:
            cells = (_cell(run.parts.get(part) for run in _of(runs, name)) for name in names)
            rows.append([f"{task}, {part}", runs[0].figure, *cells])
    return [["task", "figure", *names], *rows]


def as_markdown(found: Outcomes) -> str:
    """The table, how large the models are and what failed."""
    head, *rows = rows_of(found)
    table = [head, ["---"] * len(head), *rows]
    lines = ["# Tasks and architectures", "", *("| " + " | ".join(row) + " |" for row in table)]
    if (seeds := len({run.seed for run in found.runs})) > 1:
        lines += ["", f"Means and standard deviations over {seeds} seeds."]
    sized = ["task", "architecture", "learning rate", "parameters", "bytes remembered", "seconds of training"]
    lines += ["", "| " + " | ".join(sized) + " |", "|---" * len(sized) + "|"]
    for task, name in dict.fromkeys((run.task, run.architecture) for run in found.runs):
        runs = [run for run in found.runs if (run.task, run.architecture) == (task, name)]
        seconds = statistics.fmean(run.seconds for run in runs)
        own = (task, name, f"{runs[0].lr:g}", f"{runs[0].parameters:,}", f"{runs[0].state_bytes:,}", f"{seconds:.0f}")
        lines.append("| " + " | ".join(own) + " |")
    lines += [f"\n{name} failed: {reason}" for name, reason in found.failed.items()]
    return "\n".join(lines) + "\n"


def draw(found: Outcomes, out: Path) -> Path | None:
    """Writes the plot: each task a panel, in it each architecture's mean, and a line from its worst seed to its
    best. None where there is nothing to draw. Raises RunError where it cannot be written."""
    tasks, names = _names(found)
    if not tasks:
        return None
    axes, save = _panels(len(tasks), height=0.7 + 0.22 * len(names))
    for panel, task in zip(axes, tasks, strict=True):
        runs = [run for run in found.runs if run.task == task]
        for place, name in enumerate(names):
            values = [run.value for run in _of(runs, name) if run.value is not None]
            if values:
                mean, colour = statistics.fmean(values), COLOURS[place % len(COLOURS)]
                panel.barh(place, mean, height=0.7, color=colour, alpha=0.85)
                panel.plot([min(values), max(values)], [place, place], color="black", linewidth=1.2)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_title(task, loc="left")
        panel.set_xlabel(runs[0].figure)
        if runs[0].figure == "accuracy":
            panel.set_xlim(0, 1)
        panel.grid(True, axis="x", alpha=0.3)
    return save(out)


def draw_memory(found: Outcomes, out: Path) -> Path | None:
    """Writes the plot of tasks that ask for what stood in the sequence: accuracy against the bytes that a model
    remembers at its end. None where there is no such task. Raises RunError where it cannot be written."""
    _, names = _names(found)
    tasks = list(dict.fromkeys(run.task for run in found.runs if run.recalls))
    if not tasks:
        return None
    axes, save = _panels(len(tasks), height=2.6)
    for panel, task in zip(axes, tasks, strict=True):
        runs = [run for run in found.runs if run.task == task and run.value is not None]
        for place, name in enumerate(names):
            if own := _of(runs, name):
                values = [run.value for run in own if run.value is not None]
                size, mean, colour = own[0].state_bytes, statistics.fmean(values), COLOURS[place % len(COLOURS)]
                panel.plot([size, size], [min(values), max(values)], color=colour, linewidth=1.2)
                marker = "os^D"[place // len(COLOURS) % 4]
                panel.plot([size], [mean], marker=marker, color=colour, linestyle="", label=name)
        panel.set_title(task, loc="left")
        panel.set(ylim=(-0.03, 1.03), xlabel="KiB remembered at the end", ylabel="accuracy")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}")
        panel.grid(True, alpha=0.3)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return save(out)


def _names(found: Outcomes) -> tuple[list[str], list[str]]:
    """Tasks and architectures, in order."""
    return list(dict.fromkeys(run.task for run in found.runs)), list(dict.fromkeys(r.architecture for r in found.runs))


def _of(runs: list[Outcome], architecture: str) -> list[Outcome]:
    return [run for run in runs if run.architecture == architecture]


def _cell(found: Iterable[float | None]) -> str:
    values = [value for value in found if value is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _panels(count: int, height: float):
    """Axes, two beside each other, and what writes their figure to a file."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(count, 2)
    rows = -(-count // columns)
    drawing = Figure(figsize=(4.2 * columns, height * rows + 0.5), layout="constrained")
    every = drawing.subplots(rows, columns, squeeze=False).flatten()
    for empty in every[count:]:
        empty.set_axis_off()

    def save(out: Path) -> Path:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transpoint"}):
            try:
                drawing.savefig(out, metadata={"Date": None})
            except OSError as error:
                raise RunError(f"the plot cannot be written to '{out}': {error}") from error
        return out

    return list(every[:count]), save
