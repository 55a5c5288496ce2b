"""*align*: each mixer alone learns to give the teacher's attention output."""

from typing import TYPE_CHECKING

from .stage import Stage

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains each mixer alone to give the teacher's attention output from the teacher's own input."""
    from ..objectives import Alignment
    from .training import trained

    student = session.student_before("align").train()
    own = groups(student, session.recipe)
    return trained(session, folder, student, own, lambda teacher: Alignment(teacher, student))


def groups(student, recipe) -> "list[ParameterGroup]":
    from ..train.groups import mixer_parameters

    return [{"name": "mixers", "parameters": mixer_parameters(student), "lr": recipe.align.lr}]


def operations(teacher, student, length: int) -> float:
    from ..train.flops import align_flops

    return align_flops(teacher, student, length)


ALIGN = Stage(
    "align",
    run,
    reads=("align", "data"),
    code=2,
    makes_student=True,
    trains=True,
    groups=groups,
    operations=operations,
)
