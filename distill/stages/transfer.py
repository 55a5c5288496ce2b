"""*transfer*: the student is built, and gets the teacher's weights, or those of a student to go on from; without a
teacher, those that training from scratch begins with."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..settings import setting
from .select import selected
from .stage import Stage

if TYPE_CHECKING:
    from ...students import HybridForCausalLM
    from ..config import Recipe
    from ..run.folder import StageFolder
    from .session import Session


@dataclass
class TransferConfig:
    start: str | None = setting(
        None,
        "a student of the same teacher to go on from, by its folder, or that of the run that made it: its mixers stay, "
        "further attention is converted; null: the teacher",
        path="written",
    )


def run(session: "Session", folder: "StageFolder") -> dict:
    """Builds the student and gives it the teacher's weights."""
    import dataclasses

    from ...students import build_student
    from ...teachers import teacher_commit, teacher_info
    from ..errors import RunError
    from ..export.formats import find_format
    from ..models import load_model
    from ..run.seconds import part
    from ..trans_points import check_schedules, never_distilled
    from .preflight import check_prompts

    recipe = session.recipe
    config = session.teacher.config
    longest = getattr(config, "max_position_embeddings", None)
    check_schedules(recipe, config.num_hidden_layers, longest)  # better now than after training
    chosen = selected(recipe, session.folder("select"), config.num_hidden_layers)
    folder_before = start_folder(recipe)
    start = None if folder_before is None else load_model(folder_before, session.teacher.dtype)
    with part("building"):
        student = build_student(session.teacher, chosen, cast("HybridForCausalLM | None", start))
    if session.exports:
        kind = find_format(recipe.export.format)
        if reason := kind.why_not(student) or kind.why_not_dtype(recipe.export.dtype, student):
            raise RunError(f"export.format={recipe.export.format} cannot hold this student: {reason}")
        with part("verifying"):
            kind.check_tokenizer(student, session.tokenizer)
        check_prompts(session.tokenizer, session.teacher, recipe)
    if line := never_distilled(recipe, student.config.mixers, longest):
        session.say(f"transfer: {line}")
    session.save(student, folder)
    if session.accelerator.is_main_process and not recipe.from_scratch:
        (folder / "transfer_plan.txt").write_text(str(student.transfer_plan), encoding="utf-8")
    facts: dict = {"mixers": student.config.mixers}
    if not recipe.from_scratch:
        source = recipe.teacher.source
        teacher = teacher_info(source, teacher_commit(source, recipe.teacher.revision))
        facts["teacher"] = dataclasses.asdict(teacher)
    return facts | {"quality": session.measure(student, "transfer")}


def start_folder(recipe: "Recipe") -> Path | None:
    """The folder of the student that a run goes on from, None where it is none. Raises RunError where it has none."""
    from ..errors import RunError
    from .inputs import latest_student

    if (given := TRANSFER.of(recipe).start) is None:
        return None
    folder = Path(given).expanduser()
    if (folder / "recipe.yaml").is_file():
        folder = latest_student(folder)
    if not (folder / "config.json").is_file():
        raise RunError(f"transfer.start is '{given}': no run, and no student's folder")
    return folder


def new_mixers(student: "HybridForCausalLM", recipe: "Recipe") -> set[int]:
    """The layers of a run's student that become mixers in this run."""
    from ..models import load_config

    start, mixers = start_folder(recipe), student.config.mixers
    before = ["attention"] * len(mixers) if start is None else load_config(start).mixers
    return {i for i, (was, mixer) in enumerate(zip(before, mixers, strict=True)) if was == "attention" != mixer}


TRANSFER: Stage = Stage(
    "transfer",
    run,
    reads=("teacher", "student", "transfer"),
    code=2,
    settings=TransferConfig,
    unread=lambda recipe: ("transfer",) if TRANSFER.of(recipe).start is None else (),
    makes_student=True,
)
