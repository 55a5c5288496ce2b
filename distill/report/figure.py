"""The figure of a layer plan: which token is computed by what in which layer.

Drawn by matplotlib, an optional dependency: `pip install 'transpoint[figure]'`.
"""

import math
from pathlib import Path

from ...students.modeling.configuration_mixers import MIXERS, have_trans_points
from ..errors import RunError

COLOURS = {
    "attention, kept": "#1f3b6f",
    "attention": "#7fa6dd",
    "state space": "#f2b56b",
    "window and state": "#c9a27e",
}


def draw(mixers: list[str], trans_points: list[int | float], out: str | Path, tokens: int | None = None) -> Path:
    """Writes the figure to `out`; its ending says the format (svg, png, pdf).

    Args:
        mixers: of each layer.
        trans_points: of each layer, `math.inf` and 0 among them.
        tokens: along the axis; None: twice the largest finite TransPoint.

    Raises:
        RunError: matplotlib is missing, or `out` cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RunError("figures need matplotlib: pip install 'transpoint[figure]'") from error
    finite = sorted(point for point in set(trans_points) if 0 < point < math.inf)
    end = tokens or int(2 * finite[-1] if finite else 1024)
    first = min([point for point in finite if point < end] or [end]) / 2  # the axis begins there: it is logarithmic
    layers = len(mixers)
    figure = Figure(figsize=(7, 1.1 + 0.16 * layers), layout="constrained")
    axes = figure.subplots()
    used = {}
    for layer, (mixer, point) in enumerate(zip(mixers, trans_points, strict=True)):
        border = min(max(point, first), end)
        attention = "attention, kept" if mixer == "attention" else "attention"
        beside = mixer in MIXERS and MIXERS[mixer].load().spanned and not have_trans_points([mixer])
        state = "window and state" if beside else "state space"
        for kind, a, b in ((attention, first, border), (state, border, end)):
            if b > a:
                axes.barh(layer, b - a, left=a, height=0.86, color=COLOURS[kind])
                used[kind] = Patch(color=COLOURS[kind], label=kind)
    ticks = [point for point in finite if point <= end] or [end]
    axes.set_xscale("log", base=2)
    axes.set(xlim=(first, end), ylim=(-0.6, layers - 0.4), xlabel="token (logarithmic)", ylabel="layer")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(0, layers, max(1, layers // 8)))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [used[kind] for kind in COLOURS if kind in used]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    # The same plan gives the same file: no date, no random ids. Text stays text, and so the file small.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transpoint"}):
        try:
            figure.savefig(out, dpi=150, metadata={"Date": None} if str(out).endswith(".svg") else None)
        except (OSError, ValueError) as error:
            raise RunError(f"the figure cannot be written to '{out}': {error}") from error
    return Path(out)
