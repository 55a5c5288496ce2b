"""What a run came to, from its records: for the console and the model card."""

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ...teachers import TeacherInfo, teacher_info
from ...teachers.names import is_scratch
from ..export.card import CardFacts, plan_in_letters, plan_in_words, quality_row, schedule_rows
from ..export.formats import find_format
from ..measure.figures import filled, rows_beside
from ..run.files import read_json
from ..run.records import Cost, Measures, Quality, ScheduleRecord, StageRecord, read_record, shown
from ..stages.inputs import lineage
from ..stages.pipeline import names
from .seconds import SecondsTable, seconds_table


def card_facts(root: Path) -> CardFacts:
    """What the records of a run say for the model card of its latest student."""
    done, made = lineage(root), names(lambda stage: stage.makes_student)
    recipe = [record for stage, record in done.items() if stage in made][-1].recipe
    tokens = {stage: one.training.tokens or 0 for stage, one in done.items() if one.training is not None}
    # Read when the run began, or now where an earlier version did not.
    known, source = done["transfer"].teacher, recipe["teacher"]["source"]
    info = TeacherInfo(**known) if known else None if is_scratch(source) else teacher_info(source)
    if info is not None and info.commit is not None:  # whoever runs the recipe gets the same teacher
        recipe = {**recipe, "teacher": {**recipe["teacher"], "revision": info.commit}}
    return CardFacts(info, recipe, tokens, quality_rows(root, done), done.get("evaluate", StageRecord()).measures)


def quality_rows(root: Path, done: dict[str, StageRecord]) -> list[dict]:
    """Held-out quality of the teacher and of each stage's student, as recorded; `done`: of `lineage`."""
    teacher = read_json(root / "teacher_quality.json")
    rows = [quality_row("teacher", read_record(Quality, teacher))] if isinstance(teacher, dict) else []
    made = names(lambda stage: stage.makes_student)
    found = {stage: record.quality for stage, record in done.items() if stage in made}
    return rows + [quality_row(f"after {stage}", quality) for stage, quality in found.items() if quality is not None]


def summary(root: Path) -> list:
    """What a finished run shows: layer plan, quality by stage, answers, seconds, and how to load the checkpoint."""
    done = lineage(root)
    rows = quality_rows(root, done)
    evaluated = done.get("evaluate", StageRecord())
    if evaluated.quality is not None:
        rows.append(quality_row("exported checkpoint", evaluated.quality))
    table = quality_table(rows, "held-out quality")
    parts: list = []
    models: dict[str, str] = {name: name for name in ("teacher", "student") if name in evaluated.measures}
    beside = beside_table(evaluated.measures, models, " beside ".join(models))
    if "transfer" in done:
        mixers = done["transfer"].mixers
        parts = [f"layer plan: {plan_in_letters(mixers)}  ({plan_in_words(mixers)})", table]
    if beside.rows:
        parts.append(beside)
    if evaluated.schedules:
        parts.append(schedule_table(evaluated.schedules))
    for entry in evaluated.answers:
        answered = {"teacher": entry.teacher, "student": entry.student} if "teacher" in models else {"": entry.student}
        lines = [f"{'question' if 'teacher' in models else 'text'}: {entry.prompt}"]
        parts.append("\n".join(lines + [f" {name or 'goes on'}: {text}" for name, text in answered.items()]))
    if (seconds := seconds_table(root, done)) is not None:
        parts.append(_timetable(seconds))
    if "export" in done and (name := done["export"].folder):
        folder = (root / "export" / name).resolve()
        parts.append(f"checkpoint: {folder}\n\n{find_format(name).snippet(str(folder))}")
    return parts


def quality_table(rows: list[dict], title: str) -> Table:
    """Held-out quality, a row for each model: see `export.card.quality_row`."""
    head, cells = filled(
        ("model", "KL from teacher", "perplexity", "bits per byte", "same top token"),
        [
            (
                escape(row["model"]),
                shown(row["kl"], "{:.4f}"),
                shown(row["perplexity"], "{:.2f}"),
                shown(row["bits_per_byte"], "{:.4f}"),
                shown(row["same_top"], "{:.1%}"),
            )
            for row in rows
        ],
    )
    table = Table(*head, title=escape(title))
    for row in cells:
        table.add_row(*row)
    return table


def beside_table(measures: dict[str, Measures], names: dict[str, str], title: str | None = None) -> Table:
    """What else was measured, a column for each model of `names`: of "student", and of "teacher" where there is one."""
    table = Table("", *map(escape, names.values()), title=title)
    for row in rows_beside(measures):
        table.add_row(escape(row[0]), *row[-len(names) :])
    return table


def schedule_table(records: list[ScheduleRecord]) -> Table:
    """Quality and cost by schedule, for a console of 80 columns: the model card has it all in words."""
    cost, late = records[0].cost or Cost(), (records[0].quality or Quality()).late
    length = shown(cost.length, "{:,}")
    title = f"schedules (cost: one sequence of {length} tokens, {cost.dtype} on {cost.device})"
    head = ("schedule", "trained", "KL", f"KL>{late}", "ppl", "top", "attn", "cache", "", "token")
    (first, *others), rows = filled(head, [(*row[:8], "", row[9]) for row in schedule_rows(records)])  # no prefill
    table = Table(first, title=title, padding=(0, 0, 0, 1))
    for name in others:
        table.add_column(name, no_wrap=True)
    lists: list[str] = []
    for name, *row in rows:
        if len(name) > 14:  # a list too long for its column
            lists.append(f"({len(lists) + 1}) {name}")
            name = f"({len(lists)})"
        table.add_row(name, *row)
    table.caption = Text("\n".join(lists)) if lists else None  # not a string, in which brackets are markup
    return table


def _timetable(seconds: SecondsTable) -> Table:
    """Without lines between columns: as many stages as there are go into 80 columns."""
    table = Table(title="seconds", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.caption = Text("\n".join(seconds.notes)) if seconds.notes else None
    for name in seconds.head:
        table.add_column(name, justify="right" if name else "left")
    for row in seconds.rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*seconds.rows[-1])
    return table
