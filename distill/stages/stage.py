"""What a stage is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...students import HybridForCausalLM
    from ..config import Recipe
    from ..run.folder import StageFolder
    from ..train.groups import ParameterGroup
    from .session import Session


@dataclass(frozen=True)
class Stage:
    """A stage: what it does, and what its result depends on.

    Attributes:
        name: of its folder, and of its section in a recipe.
        run: does it; takes the session and its folder, returns what done.json holds.
        reads: the sections of a recipe that its result depends on, besides what the stages before it read.
        unread: takes a recipe; sections of `reads`, and settings in them ("student.mixer"), that make no difference.
        in_precision: whether it runs in the precision that training has, without training.
        code: of what it does. Raise it where the same settings and inputs would give another result.
        settings: its section of a recipe, a dataclass of `setting`s; None where it has none, or it is in `Recipe`.
        makes_student: whether it leaves a student in its folder, "student".
        trains: whether it trains, and so has the settings of `TrainConfig`, and logs steps.
        groups: takes a student, which it may change, and the recipe; the groups of parameters that it trains.
        takes_teacher: whether a stage that trains runs the teacher meanwhile.
        operations: takes teacher, student and the length of a sequence; the operations of a token, where it trains (see
            `flops`).
        needs_teacher: whether it takes something from a teacher, and so is no part of a run from scratch.
        wanted: whether a recipe asks for it. One that is not is no part of its run.
        check: refuses a recipe that it cannot do, before anything is loaded or written.
        look_ahead: refuses, before any stage runs, what would only be found out after those before it.
    """

    name: str
    run: Callable[["Session", "StageFolder"], dict]
    reads: tuple[str, ...]
    unread: Callable[["Recipe"], tuple[str, ...]] = lambda recipe: ()
    in_precision: bool = False
    code: int = 1
    settings: type | None = None
    makes_student: bool = False
    trains: bool = False
    groups: "Callable[[HybridForCausalLM, Recipe], list[ParameterGroup]] | None" = None
    takes_teacher: Callable[["Recipe"], bool] = lambda recipe: True
    operations: Callable[[Any, Any, int], float] | None = None
    needs_teacher: bool = False
    wanted: Callable[["Recipe"], bool] = lambda recipe: True
    check: Callable[["Recipe"], None] = lambda recipe: None
    look_ahead: Callable[["Session"], None] = lambda session: None

    def of(self, recipe: "Recipe") -> Any:
        """Its section of a recipe."""
        return getattr(recipe, self.name)
