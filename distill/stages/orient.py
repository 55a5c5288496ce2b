"""*orient*: the matrices of the mixers between tokens are fitted to the teacher's attention matrices (MOHAWK's first
stage, arXiv 2408.10189). Off unless a recipe gives it steps.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..settings import TrainConfig, setting
from .stage import Stage

if TYPE_CHECKING:
    from ..run import StageFolder
    from ..session import Session


@dataclass
class OrientConfig(TrainConfig):
    steps: int = setting(0, "optimizer steps; 0: the stage is left out", minimum=0)


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains what each mixer's matrix depends on."""
    from ..groups import ParameterGroup, matrix_parameters
    from ..objectives import Orientation
    from ..run import RunError
    from .training import trained

    student = session.student_before("orient").train()
    if not (parameters := matrix_parameters(student)):
        mixer = session.recipe.student.mixer
        raise RunError(f"orient.steps is set, and a {mixer} mixer has no matrix between tokens: set it to 0")
    lr = ORIENT.of(session.recipe).lr
    groups: list[ParameterGroup] = [{"name": "matrices", "parameters": parameters, "lr": lr}]
    return trained(session, folder, student, Orientation(session.teacher, student), groups)


def operations(teacher, student, length: int) -> float:
    from ..flops import orient_flops

    return orient_flops(teacher, student, length)


ORIENT: Stage = Stage(
    "orient",
    run,
    reads=("orient", "data"),
    settings=OrientConfig,
    makes_student=True,
    trains=True,
    operations=operations,
    wanted=lambda recipe: ORIENT.of(recipe).steps > 0,
)
