"""*train*: a model without a teacher learns from text, end to end. The stage of runs from scratch alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..settings import TrainConfig, setting
from .distill import operations
from .stage import Stage

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from .session import Session


@dataclass
class TrainTextConfig(TrainConfig):
    steps: int = setting(1000, "optimizer steps", minimum=0)
    batch_size: int = setting(16, "sequences in a step, over all processes and accumulation", minimum=1)
    lr: float = setting(3e-3, "learning rate of all parameters, at its highest", above=0)
    weight_decay: float = setting(0.1, "of AdamW, on matrices only", minimum=0)
    gradient_checkpointing: bool = setting(
        False,
        "whether layers are computed again in the backward pass: a third more time for far less memory",
        result=False,
    )


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains the model end to end on the next token of the text."""
    from ..models import has_trans_points
    from ..objectives import LanguageModeling
    from ..trans_points import mark_trained, resolve
    from .training import end_to_end, trained

    student, own = end_to_end(session, folder)
    schedules = resolve(student, [session.recipe.student.trans_points]) if has_trans_points(student) else {}
    marked = mark_trained(student, schedules if TRAIN.of(session.recipe).steps else {})
    return trained(session, folder, student, own, lambda _: LanguageModeling(student)) | {"trained_schedules": marked}


def groups(student, recipe) -> "list[ParameterGroup]":
    from ..train.groups import GROUPS, group_of

    members: dict[str, dict] = {name: {} for name in GROUPS}
    for name, parameter in student.named_parameters():
        members[group_of(name, student)][name] = parameter
    lr = TRAIN.of(recipe).lr
    return [{"name": name, "parameters": found, "lr": lr} for name, found in members.items() if found]


TRAIN: Stage = Stage(
    "train",
    run,
    reads=("train", "data"),
    settings=TrainTextConfig,
    makes_student=True,
    trains=True,
    groups=groups,
    operations=operations,
    wanted=lambda recipe: recipe.from_scratch,
    takes_teacher=lambda recipe: False,
)
