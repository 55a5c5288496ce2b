"""*distill*: the student learns end to end from the teacher's predictions."""

from typing import TYPE_CHECKING

from .stage import Stage

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from ..train.protocols import Objective
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Trains the student end to end on the KL from the teacher's predictions."""
    import copy

    from ...teachers import output_head
    from ..models import has_trans_points
    from ..objectives import CachedDistillation, Distillation
    from ..trans_points import mark_trained, resolve, trans_points_in_step
    from .training import end_to_end, trained as train_student

    settings = session.recipe.distill
    student, trained_groups = end_to_end(session, folder)
    cached = session.cached_targets() if settings.teacher_cache else None
    head = None
    if cached is not None:
        session.say(f"distill: the teacher is read from {settings.teacher_cache}: {cached.summary}")
        if cached.index["hidden"]:  # a copy, which stays when the teacher leaves the device
            head = copy.deepcopy(output_head(session.teacher, check=False))

    def objective(teacher) -> "Objective":
        if cached is None:
            return Distillation(teacher, student, settings)
        return CachedDistillation(student, settings, cached.index["vocab_size"], head)

    own = {} if cached is None else {"teacher_cache": {name: cached.index[name] for name in ("k", "kl", "rest_mass")}}
    if not has_trans_points(student):
        return train_student(session, folder, student, trained_groups, objective, cached) | own
    schedules = resolve(student, [session.recipe.student.trans_points, *settings.sample_schedules])
    trained = mark_trained(student, schedules if settings.steps else {})

    def trans_points(step: int) -> list:
        targets, recipe = list(schedules.values()), session.recipe
        return trans_points_in_step(step, targets, recipe.length_in("distill"), settings, recipe.run.seed)

    done = train_student(session, folder, student, trained_groups, objective, cached, trans_points)
    return done | own | {"trained_schedules": trained}


def groups(student, recipe) -> "list[ParameterGroup]":
    from ..train.groups import distill_groups
    from ..train.lora import attach

    settings = recipe.distill
    attach(student, settings.lora, "distill")
    return distill_groups(student, settings)


def operations(teacher, student, length: int) -> float:
    from ..train.flops import distill_flops

    return distill_flops(teacher, student, length)


def look_ahead(session: "Session") -> None:
    """A cache of the teacher's predictions that does not fit is refused before the stages before it run."""
    if session.recipe.distill.teacher_cache:
        session.cached_targets()


DISTILL = Stage(
    "distill",
    run,
    reads=("distill", "data"),
    code=2,
    makes_student=True,
    trains=True,
    groups=groups,
    takes_teacher=lambda recipe: not recipe.distill.teacher_cache,
    operations=operations,
    look_ahead=look_ahead,
    needs_teacher=True,
)
