"""The pages of probes: their figures drawn, and in numbers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from .charts import Series, heat_map, line_chart
from .page import render


@dataclass
class _Section:
    title: str
    note: str
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    charts: list[dict] = field(default_factory=list)

    def draw(self, title: str, svg: str) -> None:
        self.charts.append({"title": title, "svg": Markup(svg)})  # noqa: S704 - our own drawing


def write_model_page(found: dict, out: Path) -> Path:
    """The page of what `probe_model` found. Raises RunError where matplotlib is missing or it cannot be written."""
    sections = [_lens(found["lens"])]
    sections += [_heads(found["heads"])] if found["heads"] else []
    sections += [_changed(found["changed"]), _recalled(found["recalled"])]
    about = f"{found['sequences']:,} sequences of {found['length']:,} tokens"
    return _write(found["model"], about, sections, out)


def write_othello_page(found: dict, out: Path) -> Path:
    """The page of what `othello` found; errors as `write_model_page`."""
    settings, section = found["settings"], _Section("The board, read by linear probes", "")
    for kind, title in (("hidden", "hidden states"), ("state", "states")):
        lines: dict[str, Series] = {}
        for which in ("trained", "untrained"):
            known = [(layer, part[kind]["discs"]) for layer, part in enumerate(found[which]) if part[kind]]
            if known:
                lines[which] = ([layer for layer, _ in known], [share for _, share in known])
        if lines:
            svg = line_chart(f"discs-{kind}", lines, "share", f"discs whose owner is read off {title}", "layer")
            section.draw(f"Whose a disc is, read off {title}", svg)
    section.head = ["read off", "all squares", "discs"]
    section.rows = othello_rows(found)
    section.note = (
        "All squares: empty, mine or yours. Discs: mine or yours, where there is one. Most frequent: by square and "
        "number of the move. The moves: a linear probe of by whom each square was taken, without any model."
    )
    about = (
        f"{settings['mixer']}, {found['parameters']:,} parameters, {settings['steps']:,} steps of "
        f"{settings['batch_size']} games; {found['legal']:.1%} of its most likely moves are legal "
        f"({found['chance']:.1%} of all empty squares are)"
    )
    return _write("Othello", about, [section], out)


def othello_rows(found: dict) -> list[list[str]]:
    """What was read off what, and shares of squares and discs that are right."""
    rows = [("most frequent", found["majority"]), ("the moves", found["moves"])]
    for which in ("untrained", "trained"):
        for layer, part in enumerate(found[which]):
            names = {"hidden": "hidden states", "state": "state"}
            rows += [(f"{which}, layer {layer}, {name}", part[kind]) for kind, name in names.items() if part[kind]]
    return [[name, f"{part['squares']:.1%}", f"{part['discs']:.1%}"] for name, part in rows]


def _lens(found: dict) -> _Section:
    section = _Section(
        "Predictions by layer",
        "As if each layer were the last one (logit lens). KL in nats a token: of teacher and student from what they "
        "predict in the end, and of the student's layer from the same of the teacher.",
        ["layer", *(f"{name}: {what}" for name in found for what in ("KL", "same top token"))],
    )
    for key, title in (("kl", "KL"), ("same_top", "Same most likely token")):
        lines = {name: _by_layer([part[key] for part in parts]) for name, parts in found.items()}
        section.draw(title, line_chart(key, lines, title, f"{title}, by layer", "layer"))
    for layer in range(max(map(len, found.values()))):
        row = [str(layer)]
        for parts in found.values():
            part = parts[layer] if layer < len(parts) else None
            row += ["–", "–"] if part is None else [f"{part['kl']:.3f}", f"{part['same_top']:.1%}"]
        section.rows.append(row)
    return section


def _heads(found: dict) -> _Section:
    section = _Section(
        "States by head", "Half-life: tokens after which half of a state is left; norm: mean over tokens."
    )
    for key, title in (("half_life", "Half-life"), ("norm", "Norm")):
        rows = {int(layer): part[key] for layer, part in found.items() if part[key] is not None}
        if rows:
            heads = range(max(map(len, rows.values())))
            svg = heat_map(key, heads, _filled(rows, len(heads)), f"{title} by layer and head", "head")
            section.draw(title, svg)
    section.head = ["layer", "half-life, least", "median", "most", "norm, least", "median", "most"]
    for layer, part in found.items():
        section.rows.append([str(layer), *_spread(part["half_life"]), *_spread(part["norm"])])
    return section


def _changed(found: dict) -> _Section:
    section = _Section(
        "What changes with one token",
        "Relative change of hidden states and states, so many tokens after the one token that was replaced.",
    )
    _by_distance(section, found, "{:.1e}")
    for kind in ("state", "hidden"):
        if rows := {int(layer): values for layer, values in found[kind].items()}:
            powers, width = range(len(found["distances"])), len(found["distances"])
            svg = heat_map(
                f"changed-{kind}", powers, _filled(rows, width), f"{kind} by distance", "log2 of the distance"
            )
            section.draw({"state": "States", "hidden": "Hidden states"}[kind], svg)
    return section


def _recalled(found: dict) -> _Section:
    section = _Section(
        "Tokens read off by linear probes",
        "R² of a ridge regression of the embedding of the token so many tokens before, on held-out sequences.",
    )
    _by_distance(section, found, "{:.3f}")
    return section


def _by_distance(section: _Section, found: dict, form: str) -> None:
    section.head = ["layer", *(f"{distance}" for distance in found["distances"])]
    for kind in ("hidden", "state"):
        for layer, values in found[kind].items():
            missing = [""] * (len(found["distances"]) - len(values))
            section.rows.append([f"{kind}, {layer}", *missing, *map(form.format, values)])


def _by_layer(values: list[float]) -> tuple[list[int], list[float]]:
    return list(range(len(values))), values


def _filled(rows: dict[int, Sequence[float]], width: int) -> dict[int, list[float]]:
    return {layer: [float("nan")] * (width - len(values)) + list(values) for layer, values in rows.items()}


def _spread(values: list[float] | None) -> list[str]:
    if values is None:
        return ["–"] * 3
    ordered = sorted(values)
    return [f"{value:.3g}" for value in (ordered[0], ordered[len(ordered) // 2], ordered[-1])]


def _write(name: str, about: str, sections: list[_Section], out: Path) -> Path:
    contents = {"name": name, "about": about, "sections": sections, "written": time.strftime("%Y-%m-%d %H:%M")}
    return render("probe.html.jinja", contents, out)
