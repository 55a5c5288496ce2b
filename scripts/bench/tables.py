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


def table(report):
    """The Markdown of one report."""
    return f"{summary(report)}\n\n{details(report)}"


def summary(report):
    """A row for each op, shape and pass."""
    rates = report["ceilings"]
    versions = ", ".join(f"{n} {v}" for n, v in report["versions"].items() if v)
    missing = ", ".join(n for n, v in report["versions"].items() if not v)
    first = report.get("first_step")
    first = (
        f" First training step of a process: {first['compiling']:.1f} s, later {first['cached']:.1f} s."
        if first
        else ""
    )
    lines = [
        f"### {report['gpu']}",
        "",
        f"`{report['command']}`: {rates_text(rates)}. {versions}{f'; not installed: {missing}' if missing else ''}. "
        f"Times in ms, memory in MB.{first}",
        "",
        "| op | shape | pass | graph | eager | best peer | its graph | faster by | its eager | faster by "
        "| floor | times floor | memory, peer's | worst error | target |",
        "|" + "---|" * 15,
    ]
    for record in report["records"]:
        ours = record["results"].get(OURS, {})
        peer, peer_ms = best_peer(record)
        ours_ms = time_of(ours)
        theirs = record["results"].get(peer, {})
        eager, peer_eager = ours.get("eager_ms"), theirs.get("eager_ms")
        name, error = worst_error(record)
        verdicts = [verdict(record, target) for target in record["targets"]]
        wrong = f"**{number(error, 2)}** " if error is not None and not error <= TOLERANCE else f"{number(error, 2)} "
        cells = [
            record["op"],
            record["shape"],
            record["pass"],
            number(ours.get("graph_ms")) or ours.get("graph_refuses", ours.get("refuses", "")),
            number(eager),
            peer or "",
            number(peer_ms) + ("" if "graph_ms" in theirs or not peer else " (eager)"),
            number(peer_ms / ours_ms if peer_ms and ours_ms else None),
            number(peer_eager),
            number(peer_eager / eager if eager and peer_eager else None),
            number(record["floor_ms"]),
            number(ours_ms / record["floor_ms"] if ours_ms else None),
            f"{number(ours.get('peak_mb'))}, {number(theirs.get('peak_mb'))}".strip(", "),
            wrong + name if name else record["errors"].get("check", ""),
            "; ".join(text + {True: " ✓", False: " ✗", None: ""}[met] for text, met in verdicts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if report["skipped"]:
        lines += ["", "Not run: " + "; ".join(report["skipped"]) + "."]
    return "\n".join(lines)


def details(report):
    """A row for each implementation of each of these."""
    lines = [
        "<details><summary>Every implementation</summary>",
        "",
        "| op, shape, pass | implementation | graph | eager | memory | first call, s | error | |",
        "|" + "---|" * 8,
    ]
    for record in report["records"]:
        for kind, result in record["results"].items():
            note = result.get("refuses") or result.get("graph_refuses")
            cells = [
                f"{record['op']} {record['shape']}, {record['pass']}",
                kind,
                number(result.get("graph_ms")),
                number(result.get("eager_ms")),
                number(result.get("peak_mb")),
                number(result.get("first_call_s"), 2),
                number(worst_error(record)[1] if kind == OURS else result.get("error"), 2),
                f"{'refuses' if 'refuses' in result else 'refuses graphs'}: {note}" if note else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "</details>", "", "<details><summary>Kernels of ours, µs of a call</summary>", ""]
    for record in report["records"]:
        spent = record["results"][OURS].get("kernels", [])
        names = (f"{name[:40]} {f'{count} x ' if count > 1 else ''}{total / count:.1f}" for name, count, total in spent)
        if spent:
            lines.append(f"- {record['op']} {record['shape']}, {record['pass']}: {', '.join(names)}")
    return "\n".join([*lines, "", "</details>"])


def rates_text(rates):
    copy, product = rates["bytes_per_s"] / 1e12, rates["flop_per_s"] / 1e12
    return f"copy {copy:.3g} TB/s, bfloat16 product {product:.3g} TFLOP/s"


def number(value, digits=3):
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
