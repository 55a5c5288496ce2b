"""*calibrate*: decay and scale of each head, measured against the teacher's."""

from typing import TYPE_CHECKING

from .select import found_before
from .stage import Stage
from .transfer import new_mixers

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Sets decay, step and scale from a few teacher batches, or as *select* has found them from the same."""
    from ..train.calibration import calibrate
    from ..trans_points import at_trans_points

    student = session.student_before("calibrate")
    layers, fits = new_mixers(student, session.recipe), found_before(session)
    with at_trans_points(student, "mamba"):  # the state-space form is what is missing its decay and scale
        for layer, mixer in enumerate(student.mixer_layers()):
            if mixer is not None and layer in layers & fits.keys():
                fits[layer].set(mixer)
        if left := layers - fits.keys():
            batches, decay = session.calibration_batches(), session.recipe.calibrate.decay
            fits |= calibrate(session.teacher, student, batches, decay, layers=left)
    session.save(student, folder)
    found = {f"layer_{layer}": fits[layer].record() for layer in sorted(layers & fits.keys())}
    return {"layers": found, "quality": session.measure(student, "calibrate")}


CALIBRATE = Stage("calibrate", run, reads=("calibrate", "data"), makes_student=True, needs_teacher=True)
