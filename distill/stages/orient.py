"""*orient*: the matrices of the mixers between tokens are fitted to the teacher's attention matrices (MOHAWK's first
stage, arXiv 2408.10189). Off unless a recipe gives it steps.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..settings import TrainConfig, setting
from .stage import Stage
from .transfer import new_mixers

if TYPE_CHECKING:
    from ..config import Recipe
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from .session import Session


@dataclass
class OrientConfig(TrainConfig):
    steps: int = setting(0, "optimizer steps; 0: the stage is left out", minimum=0)


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains what each mixer's matrix depends on."""
    from ..objectives import Orientation
    from .training import trained

    student = session.student_before("orient").train()
    own = groups(student, session.recipe)
    return trained(session, folder, student, own, lambda teacher: Orientation(teacher, student))


def groups(student, recipe) -> "list[ParameterGroup]":
    from ..train.groups import mixer_parameters

    parameters = mixer_parameters(student, new_mixers(student, recipe), only="matrix")
    return [{"name": "matrices", "parameters": parameters, "lr": recipe.orient.lr}] if parameters else []


def check(recipe: "Recipe") -> None:
    """A mixer without a matrix between tokens has nothing to be fitted."""
    from ..errors import RunError

    if not recipe.student.kind.load().matrix:
        mixer = recipe.student.mixer
        raise RunError(f"orient.steps is set, and a {mixer} mixer has no matrix between tokens: set it to 0")


def operations(teacher, student, length: int) -> float:
    from ..train.flops import orient_flops

    return orient_flops(teacher, student, length)


ORIENT: Stage = Stage(
    "orient",
    run,
    reads=("orient", "data"),
    settings=OrientConfig,
    makes_student=True,
    trains=True,
    groups=groups,
    operations=operations,
    check=check,
    wanted=lambda recipe: ORIENT.of(recipe).steps > 0,
    needs_teacher=True,
)
