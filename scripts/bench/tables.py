"""The tables of docs/results/kernels.md, from the JSON of its runs."""

import json
from pathlib import Path

from .judge import OURS, TOLERANCE, best_peer, time_of, verdict, worst_error

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def write_table(folder: Path) -> str:
    """Put the tables of all kernels-*.json in `folder` between the markers of its kernels.md, made if need be.

    Returns:
        The tables.

    Raises:
        ValueError: the page has no such markers.
    """
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels-*.json"))]
    text = "\n\n".join(table(report) for report in reports)
    page = folder / "kernels.md"
    old = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")
    return text


def table(report: dict) -> str:
    """The Markdown of one report."""
    return f"{summary(report)}\n\n{details(report)}"


def summary(report: dict) -> str:
    """A row for each op, shape and pass."""
    versions = ", ".join(f"{n} {v}" for n, v in report["versions"].items() if v)
    missing = ", ".join(n for n, v in report["versions"].items() if not v)
    text = f"`{report['command']}`: {rates_text(report['ceilings'])}. {versions}"
    text += (f"; not installed: {missing}" if missing else "") + ". Times in ms, memory in MB."
    if first := report.get("first_step"):
        text += f" First training step of a process: {first['compiling']:.1f} s, later {first['cached']:.1f} s."
    lines = [f"### {report['gpu']}", "", text, ""]
    lines += _head(
        "op | shape | pass | graph | eager | best peer | its graph | faster by | its eager | faster by | floor "
        "| times floor | memory, peer's | worst error | target"
    )
    lines += [_row(_summary_cells(record)) for record in report["records"]]
    if report["skipped"]:
        lines += ["", "Not run: " + "; ".join(report["skipped"]) + "."]
    return "\n".join(lines)


def details(report: dict) -> str:
    """A row for each implementation of each of these, and the kernels of ours."""
    rows, kernels = [], []
    for record in report["records"]:
        name = f"{record['op']} {record['shape']}, {record['pass']}"
        for kind, result in record["results"].items():
            note = result.get("refuses") or result.get("graph_refuses")
            cells = [name, kind, *(_number(result.get(key)) for key in ("graph_ms", "eager_ms", "peak_mb"))]
            cells.append(_number(result.get("first_call_s"), 2))
            cells.append(_number(worst_error(record)[1] if kind == OURS else result.get("error"), 2))
            cells.append(f"{'refuses' if 'refuses' in result else 'refuses graphs'}: {note}" if note else "")
            rows.append(_row(cells))
        if spent := record["results"][OURS].get("kernels"):
            parts = (f"{k[:40]} {f'{count} x ' if count > 1 else ''}{total / count:.1f}" for k, count, total in spent)
            kernels.append(f"- {name}: {', '.join(parts)}")
    rows = _head("op, shape, pass | implementation | graph | eager | memory | first call, s | error |") + rows
    return "\n\n".join([_folded("Every implementation", rows), _folded("Kernels of ours, µs of a call", kernels)])


def rates_text(rates: dict[str, float]) -> str:
    copy, product = rates["bytes_per_s"] / 1e12, rates["flop_per_s"] / 1e12
    return f"copy {copy:.3g} TB/s, bfloat16 product {product:.3g} TFLOP/s"


def _summary_cells(record):
    ours = record["results"].get(OURS, {})
    peer, peer_ms = best_peer(record)
    theirs = record["results"].get(peer, {})
    ms = time_of(ours)
    name, error = worst_error(record)
    error_text = _number(error, 2) if name is None or error <= TOLERANCE else f"**{_number(error, 2)}**"
    verdicts = [verdict(record, target) for target in record["targets"]]
    return [
        *(record["op"], record["shape"], record["pass"]),
        _number(ours.get("graph_ms")) or ours.get("graph_refuses", ours.get("refuses", "")),
        _number(ours.get("eager_ms")),
        peer or "",
        _number(peer_ms) + ("" if "graph_ms" in theirs or not peer else " (eager)"),
        _ratio(peer_ms, ms),
        _number(theirs.get("eager_ms")),
        _ratio(theirs.get("eager_ms"), ours.get("eager_ms")),
        _number(record["floor_ms"]),
        _ratio(ms, record["floor_ms"]),
        f"{_number(ours.get('peak_mb'))}, {_number(theirs.get('peak_mb'))}".strip(", "),
        f"{error_text} {name}" if name else record["errors"].get("check", ""),
        "; ".join(text + {True: " ✓", False: " ✗", None: ""}[met] for text, met in verdicts),
    ]


def _head(names):
    return [f"| {names} |", "|" + "---|" * (names.count("|") + 1)]


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _folded(title, lines):
    return "\n".join([f"<details><summary>{title}</summary>", "", *lines, "", "</details>"])


def _ratio(a, b):
    return _number(a / b if a and b else None)


def _number(value, digits=3):
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
