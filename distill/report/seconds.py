"""The table of where the time of a run went, for console and page: a row for each part, a column for each stage."""

from dataclasses import dataclass
from pathlib import Path

from ..run.files import read_json
from ..run.records import StageRecord, number, read_record
from ..run.seconds import OTHER, PARTS

START = "start"  # what the latest run did before its first stage


@dataclass(frozen=True)
class SecondsTable:
    """Cells as text: a row has the part's name, seconds of each stage, of all, and their share of the run. The last row
    is of whole stages; `notes` say what is special about some."""

    head: list[str]
    rows: list[list[str]]
    notes: list[str]


def seconds_table(root: Path, done: dict[str, StageRecord]) -> SecondsTable | None:
    """The seconds of a run's finished stages, `done` of `lineage`; None where none is known. Those of a stage that was
    taken over are the other run's."""
    notes: list[str] = []
    columns = {START: read_record(StageRecord, read_json(root / "seconds.json"))}
    for name, record in done.items():
        columns[name] = record
        if record.taken_over:
            columns[name] = StageRecord()
            notes.append(f"{name}: taken over from {Path(record.taken_over).name}")
        elif (record.starts or 0) > 1:
            killed = "a start that was killed counts up to its last checkpoint"
            notes.append(f"{name}: in {record.starts} starts ({killed})")
    wholes = [number(column.stage_seconds) for column in columns.values()]
    if not (of_run := sum(whole or 0.0 for whole in wholes)):
        return None

    def row(name: str, values: list[float | None]) -> list[str]:
        seconds = sum(value or 0.0 for value in values)
        return [name, *map(_seconds, values), _seconds(seconds), f"{seconds / of_run:.0%}"]

    rows = []
    for part in PARTS:
        values = [_other(c) if part == OTHER else number(c.seconds.get(part)) for c in columns.values()]
        if any(map(_seconds, values)):
            rows.append(row(part, values))
    return SecondsTable(["", *columns, "all", "share"], [*rows, row("all", wholes)], notes)


def _other(stage: StageRecord) -> float | None:
    """What no part accounts for: all of it, where an earlier version kept none."""
    known = [number(stage.seconds.get(part)) or 0.0 for part in PARTS if part != OTHER]
    whole = number(stage.stage_seconds)
    return None if whole is None else max(0.0, whole - sum(known))


def _seconds(value: float | None) -> str:
    """Empty where they round to nothing."""
    return "" if value is None or value < 0.05 else f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"
