"""Which stages there are, in order. A new one is a file of its own, with a `Stage` in it, and a line here.

This and the stages' files load nothing heavy: the command line and recipes look here. What a stage needs, it imports
when it runs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .align import ALIGN
from .calibrate import CALIBRATE
from .distill import DISTILL
from .evaluate import EVALUATE
from .export import EXPORT
from .orient import ORIENT
from .select import SELECT
from .stage import Stage
from .train import TRAIN
from .transfer import TRANSFER
from .tune import TUNE

if TYPE_CHECKING:
    from ..config import Recipe

PIPELINE: list[Stage] = [SELECT, TRANSFER, CALIBRATE, ORIENT, ALIGN, DISTILL, TUNE, TRAIN, EXPORT, EVALUATE]


def names(only: Callable[[Stage], bool] = lambda stage: True) -> list[str]:
    """Of all stages, or some, in order."""
    return [stage.name for stage in PIPELINE if only(stage)]


def stage_of(name: str) -> Stage:
    """The stage of a name."""
    return next(stage for stage in PIPELINE if stage.name == name)


def pipeline_of(recipe: "Recipe") -> list[Stage]:
    """The stages of a recipe's run."""
    scratch = recipe.from_scratch
    return [stage for stage in PIPELINE if stage.wanted(recipe) and not (scratch and stage.needs_teacher)]


def student_before(recipe: "Recipe", name: str) -> str:
    """The stage whose student a stage gets: the last one before it that leaves one."""
    found = ""
    for stage in pipeline_of(recipe):
        if stage.name == name:
            return found
        found = stage.name if stage.makes_student else found
    raise ValueError(f"no stage '{name}' in this run")
