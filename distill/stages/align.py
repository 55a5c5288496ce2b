"""*align*: each mixer alone learns to give the teacher's attention output."""

from typing import TYPE_CHECKING

from .stage import Stage

if TYPE_CHECKING:
    from ..run import StageFolder
    from ..session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains each mixer alone to give the teacher's attention output from the teacher's own input."""
    from ..groups import ParameterGroup, mixer_parameters
    from ..objectives import Alignment
    from .training import trained

    student = session.student_before("align").train()
    objective = Alignment(session.teacher, student)
    parameters, lr = mixer_parameters(student), session.recipe.align.lr
    groups: list[ParameterGroup] = [{"name": "mixers", "parameters": parameters, "lr": lr}]
    return trained(session, folder, student, objective, groups)


def operations(teacher, student, length: int) -> float:
    from ..flops import align_flops

    return align_flops(teacher, student, length)


ALIGN = Stage("align", run, reads=("align", "data"), code=2, makes_student=True, trains=True, operations=operations)
