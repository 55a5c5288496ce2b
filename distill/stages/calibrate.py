"""*calibrate*: decay and scale of each head, measured against the teacher's."""

from typing import TYPE_CHECKING

from .stage import Stage
from .transfer import new_mixers

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Sets decay, step and scale from a few teacher batches."""
    from ..train.calibration import calibrate
    from ..trans_points import at_trans_points

    student = session.student_before("calibrate")
    batches = session.calibration_batches()
    with at_trans_points(student, "mamba"):  # the state-space form is what is missing its decay and scale
        layers = new_mixers(student, session.recipe)
        found = calibrate(session.teacher, student, batches, session.recipe.calibrate.decay, layers=layers)
    session.save(student, folder)
    return {"layers": found, "quality": session.measure(student, "calibrate")}


CALIBRATE = Stage("calibrate", run, reads=("calibrate", "data"), makes_student=True, needs_teacher=True)
