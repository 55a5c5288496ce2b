"""*align*: each mixer alone learns to give the teacher's attention output."""

from typing import TYPE_CHECKING

from .stage import Stage
from .transfer import new_mixers

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

    settings, layers = recipe.align, new_mixers(student, recipe)
    parameters = mixer_parameters(student, layers)
    copied = {} if settings.copied_lr is None else mixer_parameters(student, layers, only="copied")
    if not copied:
        return [{"name": "mixers", "parameters": parameters, "lr": settings.lr}] if parameters else []
    new = {name: parameter for name, parameter in parameters.items() if name not in copied}
    groups: list[ParameterGroup] = [
        {"name": "new in mixers", "parameters": new, "lr": settings.lr},
        {"name": "copied to mixers", "parameters": copied, "lr": settings.copied_lr},
    ]
    return [group for group in groups if group["parameters"]]


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
    needs_teacher=True,
)
