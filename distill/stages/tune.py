"""*tune*: the student learns end to end on answers alone. Off unless a recipe gives it steps."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import RunError
from ..settings import EndToEndConfig, setting
from .distill import operations
from .stage import Stage

if TYPE_CHECKING:
    from ..config import Recipe
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from .session import Session


@dataclass
class TuneConfig(EndToEndConfig):
    steps: int = setting(0, "optimizer steps; 0: the stage is left out", minimum=0)
    lr: float = setting(1e-4, "learning rate of the mixers, at its highest", above=0)
    teacher_lr: float | None = setting(
        0.0, "learning rate of the parameters that were the teacher's; 0 leaves them frozen", minimum=0
    )
    loss: str = setting(
        "kd",
        "on the tokens of answers: kd (the divergence from the teacher's predictions) or ce (cross-entropy)",
        choices=("kd", "ce"),
    )
    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "sources of chats, and of rows {prompt, completion}; none: those in data.train",
            "path": "read",
        },
    )


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains the student end to end on answers, by the teacher's predictions or by the text."""
    from ..objectives import AnswerTuning
    from .training import end_to_end, trained

    settings = TUNE.of(session.recipe)
    student, own = end_to_end(session, folder)
    if known := student.config.measured_trans_points:  # at which the student before was measured, and this is another
        unmeasured = {"quality": None, "cost": None}
        student.config.measured_trans_points = [record | unmeasured for record in known if record.get("trained")]

    def objective(teacher) -> AnswerTuning:
        return AnswerTuning(teacher if settings.loss == "kd" else None, student, settings)

    return trained(session, folder, student, own, objective, session.tune_data)


def groups(student, recipe) -> "list[ParameterGroup]":
    from ..train.groups import distill_groups
    from ..train.lora import attach

    settings = TUNE.of(recipe)
    attach(student, settings.lora, "tune")
    return distill_groups(student, settings)


def check(recipe: "Recipe") -> None:
    """Text that is read while training runs is too large to look for answers in all of it before."""
    if recipe.data.streaming and not TUNE.of(recipe).train:
        raise RunError("tune reads all its text before it trains, and data.streaming is true: name chats in tune.train")


def look_ahead(session: "Session") -> None:
    """Text without an answer is refused before the stages before it run."""
    session.tune_data  # noqa: B018


def unread(recipe: "Recipe") -> tuple[str, ...]:
    own = ("divergence", "beta", "temperature") if TUNE.of(recipe).loss == "ce" else ()
    return tuple(f"tune.{name}" for name in own)


TUNE: Stage = Stage(
    "tune",
    run,
    reads=("tune", "data"),
    settings=TuneConfig,
    makes_student=True,
    trains=True,
    groups=groups,
    operations=operations,
    wanted=lambda recipe: TUNE.of(recipe).steps > 0,
    takes_teacher=lambda recipe: TUNE.of(recipe).loss == "kd",
    unread=unread,
    check=check,
    look_ahead=look_ahead,
    needs_teacher=True,
)
