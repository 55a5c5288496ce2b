"""What the records of a run hold, as types. `read_record` makes them of JSON that may be anything: records are damaged
now and then, and those of earlier versions have other fields.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Quality:
    """Means over held-out tokens. `kl` and `same_top` compare with the teacher: None where there is none."""

    tokens: int | None = None
    perplexity: float | None = None  # of the next token, within documents
    bits_per_byte: float | None = None  # the same, comparable between vocabularies
    kl: float | None = None  # KL(teacher || model), nats per token
    same_top: float | None = None  # fraction of tokens at which both have the same most likely next token
    late: int | None = None  # how many first tokens of each document late_kl leaves out
    late_kl: float | None = None  # the KL over later ones; None where there are none
    measured_on: str | None = None  # stands for the held-out sequences: only like is compared with like


@dataclass(frozen=True)
class Cost:
    """What one sequence of `length` tokens costs a model, at a schedule where it has TransPoints."""

    length: int | None = None
    attention: float | None = None  # fraction of layer-tokens whose output attention computes; None: not said
    cache_bytes: int | None = None  # held after the last of them
    prefill_seconds: float | None = None  # of all of them at once
    decode_seconds: float | None = None  # of one more token
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class ScheduleRecord:
    """What evaluate measured at a schedule of TransPoints."""

    schedule: str = ""
    trans_points: list = field(default_factory=list)
    trained: bool = False
    longest: int | None = None  # tokens of a document: no TransPoint from there on is passed
    quality: Quality | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class LayerScore:
    """What a teacher is left with where some layers' attention is replaced."""

    kl: float | None = None  # KL(teacher || it) on text, nats per token
    recall: float | None = None  # what a token of an answer lost in log-probability, nats
    accuracy: float | None = None  # fraction of answers given
    error: float | None = None  # of the mixers in their place, relative and squared, a sum over layers


@dataclass(frozen=True)
class Selection:
    """Which layers should keep attention. Keys are numbers as text, as JSON has them."""

    teacher: LayerScore | None = None
    alone: dict[str, LayerScore] = field(default_factory=dict)  # by layer: with that one alone replaced
    kept: dict[str, list] = field(default_factory=dict)  # by how many: the layers that should keep attention
    scores: dict[str, LayerScore] = field(default_factory=dict)  # by how many: with the others replaced
    gates: dict[str, float] = field(default_factory=dict)  # by layer, where they were trained: 1 stays open throughout


@dataclass(frozen=True)
class Recall:
    """How many answers of a task (see `measure.recall`) a model gives, in texts of `length` tokens."""

    task: str = ""
    length: int | None = None
    answers: int | None = None
    accuracy: float | None = None
    logprob: float | None = None  # of an answer, nats
    depths: list[float] = field(default_factory=list)  # where the answer of each text stands: 0 first, 1 last
    right: list[bool] = field(default_factory=list)  # whether it is given


@dataclass(frozen=True)
class TaskScore:
    """A figure of a task of lm-evaluation-harness (see `measure.tasks`)."""

    task: str = ""
    metric: str = ""  # with the filter of answers, where it is not the plain one: exact_match,strict-match
    value: float | None = None
    stderr: float | None = None  # None where the harness has none
    higher_is_better: bool | None = None
    samples: int | None = None  # documents


@dataclass(frozen=True)
class TextQuality:
    """Quality on one source of held-out text, or at another length of sequences."""

    source: str = ""  # empty: all of them
    length: int | None = None
    quality: Quality | None = None


@dataclass(frozen=True)
class Given:
    """What a model answered to a question, see `measure.answers.exact_match`."""

    question: str = ""
    answer: str = ""
    right: bool = False


@dataclass(frozen=True)
class Measures:
    """What *evaluate* measures of a model besides its quality on the run's held-out sequences."""

    texts: list[TextQuality] = field(default_factory=list)
    recall: list[Recall] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    questions: list[Given] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)  # by length


@dataclass(frozen=True)
class Answer:
    prompt: str = ""
    teacher: str = ""
    student: str = ""


@dataclass(frozen=True)
class Training:
    """What training came to."""

    tokens: int | None = None
    skipped: int | None = field(default=None, metadata={"keys": ["skipped", "left_out"]})  # steps: gradient not finite


@dataclass(frozen=True)
class StageRecord:
    """What done.json holds. Of the fields below `finished` a stage has those that are its own; a stage's own figures
    besides stand in the file alone."""

    recipe: dict = field(default_factory=dict)
    stage_seconds: float | None = None  # of all its starts
    seconds: dict[str, float] = field(default_factory=dict)  # the same by part, see `run.seconds`
    starts: int | None = None  # more than one where it was interrupted
    taken_over: str | None = None  # the run that it was taken over from
    finished: str | None = None
    quality: Quality | None = None
    training: Training | None = None
    selection: Selection | None = None
    mixers: list[str] = field(default_factory=list)
    teacher: dict | None = None
    folder: str | None = None
    verified: dict[str, float] = field(default_factory=dict)  # see `Format.check`
    # Of distill, by name; and of evaluate.
    trained_schedules: dict[str, list] = field(
        default_factory=dict, metadata={"keys": ["trained_schedules", "schedules"]}
    )
    schedules: list[ScheduleRecord] = field(default_factory=list)
    measures: dict[str, Measures] = field(default_factory=dict)  # of "teacher" and "student"
    answers: list[Answer] = field(default_factory=list)


def read_record(kind: type[T], value: Any) -> T:
    """An instance of one of these classes. What is missing or of another type is as if it were not there."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(typing.cast(Any, kind)):
            for key in entry.metadata.get("keys", [entry.name]):  # the later ones are those of earlier versions
                if (part := _read(hints[entry.name], value.get(key))) is not None:
                    found.setdefault(entry.name, part)
    return kind(**found)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    found = _float(value)
    return found if found is not None and math.isfinite(found) else None


def shown(value: float | None, form: str, unit: float = 1) -> str:
    """A figure as text; one that is not known is empty, and one that is not finite says so."""
    return "" if value is None else form.format(value * unit)


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def _read(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):  # with None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is float:
        return _float(value)
    if hint is int:
        return None if (found := number(value)) is None else int(found)
    if dataclasses.is_dataclass(hint):
        return read_record(typing.cast(type, hint), value) if isinstance(value, dict) else None
    if not isinstance(value, typing.get_origin(hint) or hint):
        return None
    if typing.get_origin(hint) is list:
        kind = typing.get_args(hint)[0]
        entries = [_read(kind, entry) for entry in value]
        if None in entries and not dataclasses.is_dataclass(kind):  # a layer's mixer: the others would be misplaced
            return None
        return [entry for entry in entries if entry is not None]
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return {str(key): found for key, entry in value.items() if (found := _read(kind, entry)) is not None}
    return value
