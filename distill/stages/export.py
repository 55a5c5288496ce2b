"""*export*: the checkpoint that others load is written and verified."""

from typing import TYPE_CHECKING

from .stage import Stage

if TYPE_CHECKING:
    from ..config import Recipe
    from ..run.folder import StageFolder
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Writes and verifies the checkpoint that others load."""
    from ..export.formats import quantising_costs
    from ..export.write import export
    from ..report.summary import card_facts
    from .measuring import refresh_quality

    refresh_quality(session)
    if not session.accelerator.is_main_process:
        return {}
    settings = session.recipe.export
    target = folder / settings.format
    figures = export(
        session.student_before("export"),
        session.tokenizer,
        target,
        settings.format,
        settings.dtype,
        card_facts(session.root),
    )
    costs = quantising_costs(figures)
    session.say(
        f"export: {target} loads without Transpoint; logits differ by {figures['logits']:.1e} from the student's, "
        f"decoding by {figures['decode']:.1e} from prefill" + (f"; {costs}" if costs else "")
    )
    return {"folder": settings.format, "verified": figures}


def check(recipe: "Recipe") -> None:
    """A student or a dtype that the format cannot hold, whatever the teacher, is refused before it is made."""
    from ..errors import RunError
    from ..export.formats import find_format

    kind = find_format(recipe.export.format)
    if reason := kind.why_not_dtype(recipe.export.dtype) or kind.why_no_student(recipe.student):
        raise RunError(f"export.format={recipe.export.format} cannot hold this student: {reason}")


EXPORT = Stage("export", run, reads=("export",), check=check)
