"""*transfer*: the student is built, and gets the teacher's weights."""

from typing import TYPE_CHECKING

from .select import selected
from .stage import Stage

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Builds the student and gives it the teacher's weights."""
    import dataclasses

    from ...students import build_student
    from ...teachers import teacher_info
    from ..errors import RunError
    from ..export.formats import find_format
    from ..trans_points import check_schedules, never_distilled
    from .preflight import check_prompts

    recipe = session.recipe
    config = session.teacher.config
    longest = getattr(config, "max_position_embeddings", None)
    check_schedules(recipe, config.num_hidden_layers, longest)  # better now than after training
    chosen = selected(recipe, session.folder("select"), config.num_hidden_layers)
    student = build_student(session.teacher, chosen)
    if session.exports:
        kind = find_format(recipe.export.format)
        if reason := kind.why_not(student):
            raise RunError(f"export.format={recipe.export.format} cannot hold this student: {reason}")
        kind.check_tokenizer(student, session.tokenizer)
        check_prompts(session.tokenizer, session.teacher, recipe)
    if line := never_distilled(recipe, student.config.mixers, longest):
        session.say(f"transfer: {line}")
    session.save(student, folder)
    if session.accelerator.is_main_process:
        (folder / "transfer_plan.txt").write_text(str(student.transfer_plan), encoding="utf-8")
    facts = {"mixers": student.config.mixers, "teacher": dataclasses.asdict(teacher_info(recipe.teacher.source))}
    return facts | {"quality": session.measure(student, "transfer")}


TRANSFER = Stage("transfer", run, reads=("teacher", "student"), makes_student=True)
