"""What a comparison of recipes came to: a table, and a plot of quality against tokens.

The plot is drawn by matplotlib, an optional dependency: `pip install 'transpoint[figure]'`.
"""

import statistics
from pathlib import Path

from ..compare import Compared, Comparison
from ..errors import RunError
from ..measure.figures import Figure, figures
from ..run.records import Measures, Quality

COLOURS = ("#2257a5", "#c2410c", "#17803d", "#7c3aed", "#0e7490", "#a16207", "#be185d", "#4b5563")


def rows_of(found: Comparison) -> list[list[str]]:
    """A head (measure, teacher if there is one, recipes) and a row for each figure: means over seeds, and where there
    are several their standard deviation."""
    names = list(dict.fromkeys(run.recipe for run in found.runs))
    teacher = _figures(found.teacher, found.teacher_measures)
    by_recipe = {name: [_of(run) for run in found.runs if run.recipe == name] for name in names}
    shown = list(dict.fromkeys(name for runs in by_recipe.values() for run in runs for name in run))
    rows = []
    for figure in shown:
        own = teacher.get(figure)
        rows.append([figure, "" if own is None else str(own), *(_mean(runs, figure) for runs in by_recipe.values())])
    known = teacher or not rows  # of runs from scratch there is none
    return [row if known else [row[0], *row[2:]] for row in [["", "teacher", *names], *rows]]


def as_markdown(found: Comparison) -> str:
    """The table, and what failed."""
    head, *rows = rows_of(found)
    lines = [f"# {len({run.recipe for run in found.runs})} recipes at {found.tokens:,} training tokens", ""]
    lines += [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    seeds = len({run.seed for run in found.runs})
    if seeds > 1:
        lines += ["", f"Means and standard deviations over {seeds} seeds."]
    lines += [f"\n{name} failed: {reason}" for name, reason in found.failed.items()]
    return "\n".join(lines) + "\n"


def check_drawing() -> None:
    """Raises RunError where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RunError("the plot needs matplotlib: pip install 'transpoint[figure]'") from error


def draw(found: Comparison, out: Path) -> Path:
    """Writes the plot: held-out KL after each stage, or without a teacher bits per byte, against the tokens trained on.
    Raises RunError where it cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6.4, 4), layout="constrained")
    axes = drawing.subplots()
    names = list(dict.fromkeys(run.recipe for run in found.runs))
    labelled: set[str] = set()
    scratch = all(point.quality.kl is None for run in found.runs for point in run.points if point.quality)
    for run in found.runs:
        colour = COLOURS[names.index(run.recipe) % len(COLOURS)]
        measured = [(point.tokens, point.quality) for point in run.points if point.quality]
        points = [(tokens, quality.bits_per_byte if scratch else quality.kl) for tokens, quality in measured]
        points = [(tokens, value) for tokens, value in points if tokens and value]  # untrained, nothing is compared
        if points:
            tokens, values = zip(*points, strict=True)
            label = None if run.recipe in labelled else run.recipe
            labelled.add(run.recipe)
            axes.plot(tokens, values, marker="o", color=colour, alpha=0.8, label=label)
    measure = "bits per byte of held-out text" if scratch else "held-out KL from the teacher (nats per token)"
    axes.set(xlabel="training tokens", ylabel=measure, yscale="linear" if scratch else "log")
    axes.grid(True, alpha=0.3)
    if axes.has_data():
        axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transpoint"}):
        try:
            drawing.savefig(out, metadata={"Date": None})
        except OSError as error:
            raise RunError(f"the plot cannot be written to '{out}': {error}") from error
    return out


def _of(run: Compared) -> dict[str, Figure]:
    trained = max((point.tokens for point in run.points), default=None)
    return {"training tokens": Figure(trained, "{:,.0f}")} | _figures(run.quality, run.measures)


def _figures(quality: Quality | None, measures: Measures | None) -> dict[str, Figure]:
    quality = quality or Quality()
    own = {
        "KL from teacher": Figure(quality.kl, "{:.4f}"),
        "perplexity": Figure(quality.perplexity, "{:.2f}"),
        "bits per byte": Figure(quality.bits_per_byte, "{:.4f}"),
        "same top token": Figure(quality.same_top, "{:.1%}"),
    }
    return {name: figure for name, figure in own.items() if figure.value is not None} | figures(measures or Measures())


def _mean(runs: list[dict[str, Figure]], name: str) -> str:
    known = [run[name] for run in runs if name in run]
    values = [figure.value for figure in known if figure.value is not None]
    if not values:
        return ""
    mean = known[0]._replace(value=statistics.fmean(values), form=known[0].form.partition(" ±")[0])
    if len(values) == 1:
        return str(known[0])
    return f"{mean} ± {mean._replace(value=statistics.stdev(values))}"
