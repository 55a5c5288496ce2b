"""The charts of a report, as SVG that stands in a page and takes the page's colours, light or dark.

Drawn by matplotlib, an optional dependency: `pip install 'transpoint[figure]'`.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, cast

from ..errors import RunError

# Colours that stand for the page's own, by CSS variable. Nothing else is drawn in them.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_SERIES = ("#010102", "#010103", "#010104", "#010105", "#010106")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line"} | {c: f"series-{i + 1}" for i, c in enumerate(_SERIES)}
_POINTS = 500  # of a line: more cannot be seen
_COLUMNS = 240  # of a heat map
# Inches; text is in points, so that a chart much wider than what it is shown in could not be read.
_WIDTH, _NARROW = 4.8, 3.5

Series = tuple[Sequence[float], Sequence[float]]  # steps and values


@contextmanager
def _styled() -> Iterator[None]:
    """The style of all charts, while one is drawn."""
    try:
        import matplotlib
    except ImportError as error:
        raise RunError("a report needs matplotlib: pip install 'transpoint[figure]'") from error
    style: Any = {  # matplotlib names all keys there are
        "font.size": 9,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _LINE,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.xmargin": 0.01,
        "grid.color": _LINE,
        "grid.linewidth": 0.6,
        "text.color": _INK,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _MUTED,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(style):
        yield


@_styled()
def loss_chart(
    name: str, loss: Series, below: dict[str, dict[str, Series]], marks: Mapping[str, Sequence[int]], label: str
) -> str:
    """The loss over the steps, smoothed over raw, and small panels below it.

    Args:
        name: of the chart, its own in the page.
        below: for each panel its title and lines ("" for a name that says no more).
        marks: steps at which something happened, by what.
        label: the chart in words, for who cannot see it.
    """
    figure, (axes, *panels) = _figure(_WIDTH, [2.2, *[0.8] * len(below)])
    steps, values = loss
    axes.plot(*_thin(steps, values), color=_SERIES[0], alpha=0.35, linewidth=0.8)
    axes.plot(*_thin(steps, _smooth(values)), color=_SERIES[0], linewidth=1.8, marker=_marker(values))
    _log_scale(axes, values)
    for index, (what, places) in enumerate(marks.items()):
        style = {"color": _SERIES[1], "linestyle": (":", "--")[index % 2], "linewidth": 1}
        for step in places[:_POINTS]:
            axes.axvline(step, **style, zorder=0.5)
        axes.plot([], [], **style, label=what)
    axes.set_ylabel("loss")
    _legend(axes, len(marks) > 0)
    for panel, (title, curves) in zip(panels, below.items(), strict=True):
        for index, (curve, (steps, values)) in enumerate(curves.items()):
            colour = _SERIES[index % len(_SERIES)]
            panel.plot(*_thin(steps, values), color=colour, linewidth=1, label=curve, marker=_marker(values))
        if title in ("lr", "attention"):
            panel.set_ylim(bottom=0)
        else:
            _log_scale(panel, [value for _, values in curves.values() for value in values], few=True)
        panel.set_ylabel(title)
        if panel.get_yscale() == "linear":
            panel.locator_params(axis="y", nbins=3)
            panel.yaxis.set_major_formatter(_number)
        _legend(panel, len(curves) > 1)
    _steps_below(figure, [axes, *panels])
    return _svg(figure, name, label)


@_styled()
def line_chart(name: str, lines: Mapping[str, Series], unit: str, label: str, across: str = "step") -> str:
    """A few lines over steps, or what else is `across`, from zero."""
    figure, (axes,) = _figure(_NARROW, [1.9])
    for index, (title, (steps, values)) in enumerate(lines.items()):
        colour = _SERIES[index % len(_SERIES)]
        axes.plot(*_thin(steps, values), color=colour, linewidth=1.4, label=title, marker=_marker(values))
    axes.set_ylim(0, 1.1 * max((value for _, values in lines.values() for value in values), default=1) or 1)
    axes.set_ylabel(unit)
    _legend(axes, len(lines) > 1)
    axes.yaxis.set_major_formatter(_number)
    _steps_below(figure, [axes], nbins=4, across=across)
    return _svg(figure, name, label)


@_styled()
def heat_map(
    name: str, steps: Sequence[int], rows: Mapping[int, Sequence[float]], label: str, across: str = "step"
) -> str:
    """Layers by steps, or what else is `across`, coloured by the logarithm of a figure.

    Args:
        steps: ascending, at least one.
        rows: for each layer its figures, as many as steps; nan where there is none.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    layers = sorted(rows)
    values = np.array([rows[layer] for layer in layers], dtype=float)
    values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    # Columns are equal spans of steps; one without a line takes the column before it.
    columns = min(len(steps), _COLUMNS)
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    column = np.minimum(((np.asarray(steps) - first) * columns) // (last - first), columns - 1).astype(int)
    picture = np.full((len(layers), columns), np.nan)
    for index in range(columns):
        chosen = values[:, column == index]
        if chosen.size:
            known = np.isfinite(chosen).sum(1)
            picture[:, index] = np.where(known, np.nansum(chosen, 1) / np.maximum(known, 1), np.nan)
        elif index:
            picture[:, index] = picture[:, index - 1]
    seen = picture[np.isfinite(picture)]
    low, high = (float(np.percentile(seen, q)) for q in (1, 99)) if seen.size else (0.1, 1.0)
    if high <= low * 1.01:
        low, high = low / 1.5, high * 1.5
    height = min(max(1.2, 0.5 + 0.1 * len(layers)), 4.6)
    figure, (axes,) = _figure(_WIDTH, [height])
    image = axes.imshow(
        picture,
        aspect="auto",
        interpolation="none",
        norm=LogNorm(low, high),
        cmap="viridis",
        extent=(first, last, len(layers) - 0.5, -0.5),
    )
    every = max(1, math.ceil(len(layers) / (height * 7)))
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set(ylabel="layer", xlabel=across)
    axes.grid(False)
    axes.xaxis.set_major_formatter(_number)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=40, extend="both")
    bar.outline.set_visible(False)
    _log_ticks(bar.ax.yaxis, low, high)
    return _svg(figure, name, label)


@_styled()
def layer_bars(name: str, panels: Mapping[str, Sequence[float | None]], kept: set[int], label: str) -> str:
    """A figure for each layer, one panel of bars above the other; those of layers that are `kept` in another colour."""
    figure, axes = _figure(_WIDTH, [1.1] * len(panels))
    for panel, (title, values) in zip(axes, panels.items(), strict=True):
        heights = [math.nan if value is None else value for value in values]
        colours = [_SERIES[0] if layer in kept else _SERIES[1] for layer in range(len(heights))]
        panel.bar(range(len(heights)), heights, color=colours, width=0.75)
        panel.set_ylabel(title)
        panel.locator_params(axis="y", nbins=3)
        panel.yaxis.set_major_formatter(_number)
    for kind, colour in (("keeps attention", _SERIES[0]), ("converted", _SERIES[1])):
        axes[0].bar([0], [0], color=colour, label=kind)
    _legend(axes[0], True)
    _steps_below(figure, axes, nbins=10)
    axes[-1].set_xlabel("layer")
    return _svg(figure, name, label)


def _figure(width: float, heights: list[float]):
    """A figure and its axes, one above the other, of these heights in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights) + 0.45), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    return figure, list(axes)


def _legend(axes, needed: bool) -> None:
    """Above the axes, where it covers nothing."""
    if needed:
        axes.legend(frameon=False, labelcolor=_INK, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderpad=0)


def _marker(values: Sequence[float]) -> str | None:
    """A line of one point would not be seen."""
    return "o" if len(values) == 1 else None


def _steps_below(figure, axes: list, nbins: int = 6, across: str = "step") -> None:
    axes[-1].set_xlabel(across)
    axes[-1].xaxis.set_major_formatter(_number)
    axes[-1].xaxis.get_major_locator().set_params(integer=True, nbins=nbins)
    figure.align_ylabels(axes)


def _log_scale(axes, values: Sequence[float], few: bool = False) -> None:
    """A logarithmic axis where the values span more than a few times the least of them."""
    if values and min(values) > 0 and max(values) / min(values) > 4:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, min(values), max(values), few)


def _log_ticks(axis, low: float, high: float, few: bool = False) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    subs: tuple[float, ...]
    decades = math.log10(high / low)
    if few:
        subs = (1.0, 3.0) if decades < 1.6 else (1.0,)
    else:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_number)


def _number(value: float, _=None) -> str:
    """Of a tick: 0.05, 12,000, 3M."""
    for size, suffix in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over about a 40th of the values around each, as many before as after it, so that nothing lags.

    Of positive values the geometric mean, which a spike moves little.
    """
    positive = min(values) > 0
    reach, sums = max(len(values) // 80, min(3, len(values) // 10)), [0.0]
    for value in values:
        sums.append(sums[-1] + (math.log(value) if positive else value))
    spans = ((i, min(reach, i, len(values) - 1 - i)) for i in range(len(values)))
    means = [(sums[i + near + 1] - sums[i - near]) / (2 * near + 1) for i, near in spans]
    return [math.exp(mean) for mean in means] if positive else means


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most so many points as can be seen: of each stretch the least and the greatest, so that spikes stay."""
    size = math.ceil(len(values) / (_POINTS / 2))
    if size <= 2:
        return list(steps), list(values)
    kept = set()
    for first in range(0, len(values), size):
        stretch = range(first, min(first + size, len(values)))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    chosen = sorted(kept | {0, len(values) - 1})
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _svg(figure, name: str, label: str) -> str:
    """The figure as an element of a page: its colours the page's, its ids its own, its text the page's font."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure)
        figure.get_layout_engine().execute(figure)  # else saving draws the whole figure once more to have it laid out
        figure.set_layout_engine(None)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|xlink:href=")#', rf"\1#{name}-", text)
    view = cast("re.Match[str]", re.search(r'viewBox="[^"]*"', text))[0]
    return re.sub(r"<svg.*?>", f'<svg {view} role="img" aria-label="{escape(label)}">', text, count=1, flags=re.DOTALL)
