"""What was measured, as named numbers and as rows of text. Loads nothing heavy."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..run.records import Measures, Quality, shown


class Figure(NamedTuple):
    """A number, and how it is shown: `form` of it times `unit`."""

    value: float | None
    form: str
    unit: float = 1

    def __str__(self) -> str:
        return shown(self.value, self.form, self.unit)


def in_words(quality: Quality) -> str:
    """A line of it."""
    perplexity = quality.perplexity if quality.perplexity is not None else math.nan
    if quality.kl is None:
        loss = math.log(perplexity)
        return f"loss {loss:.4f} nats a token, perplexity {perplexity:.2f}, {quality.bits_per_byte:.4f} bits per byte"
    return f"KL {quality.kl:.4f}, perplexity {perplexity:.2f}, same top token {quality.same_top:.1%}"


def figures(measures: Measures) -> dict[str, Figure]:
    """Everything that `evaluate` measures of a model besides its quality on a run's own sequences, by name."""
    found: dict[str, Figure] = {}
    for text in measures.texts:
        where, quality = f"{text.source + ', ' if text.source else ''}{_tokens(text.length)}", text.quality or Quality()
        found[f"KL from teacher ({where})"] = Figure(quality.kl, "{:.4f}")
        found[f"perplexity ({where})"] = Figure(quality.perplexity, "{:.2f}")
        found[f"bits per byte ({where})"] = Figure(quality.bits_per_byte, "{:.4f}")
    for recall in measures.recall:
        found[f"{recall.task} ({_tokens(recall.length)})"] = Figure(recall.accuracy, "{:.1%}")
    for task in measures.tasks:
        error = shown(task.stderr, " ± {:.3f}")
        found[f"{task.task}, {task.metric}"] = Figure(task.value, "{:.3f}" + error)
    if measures.questions:
        right = sum(given.right for given in measures.questions)
        found[f"questions answered exactly (of {len(measures.questions)})"] = Figure(right, "{:g}")
    for cost in measures.costs:
        where = _tokens(cost.length)
        found[f"cache ({where})"] = Figure(cost.cache_bytes, "{:.2f} MiB", 2**-20)
        found[f"prefill ({where})"] = Figure(cost.prefill_seconds, "{:.0f} ms", 1e3)
        found[f"next token after {where}"] = Figure(cost.decode_seconds, "{:.1f} ms", 1e3)
    return {name: figure for name, figure in found.items() if figure.value is not None}


def rows_beside(measures: dict[str, Measures]) -> list[tuple[str, str, str]]:
    """The figures of a student as rows of text: what, the teacher's, the student's."""
    teacher, student = (figures(measures.get(name, Measures())) for name in ("teacher", "student"))
    return [(name, str(teacher.get(name, "")), str(figure)) for name, figure in student.items()]


def filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if not rows or any(row[i] for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _tokens(length: int | None) -> str:
    return f"{shown(length, '{:,}')} tokens"
