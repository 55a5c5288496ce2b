"""Running a recipe: which of its stages must run, each in its folder."""

from collections.abc import Callable
from contextlib import nullcontext

from accelerate.utils import DistributedType, set_seed
from rich.console import Console
from rich.text import Text

from ..config import Recipe
from ..errors import RunError
from ..run.files import write_json
from ..run.folder import alone_in
from ..run.seconds import OTHER, Clock, part, ticking
from ..train.tracking import check_trackers
from ..trans_points import check_schedules
from .inputs import finished_elsewhere, stage_inputs
from .pipeline import pipeline_of
from .session import Session


@part(OTHER)
def run_recipe(
    recipe: Recipe,
    from_stage: str | None = None,
    until_stage: str | None = None,
    console: Console | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Session:
    """Runs the stages that must run, up to `until_stage`; `from_stage` and what follows run in any case.

    Raises:
        ConfigError, DataError, TeacherError, StudentError, ExportError, RunError, TrainingError: one line each.
    """
    stages = [stage.name for stage in pipeline_of(recipe)]
    for option, stage in (("--from", from_stage), ("--until", until_stage)):
        if stage is not None and stage not in stages:
            raise RunError(f"{option} {stage}: this run has no such stage; it has {', '.join(stages)}")
    last = stages.index(until_stage or stages[-1])
    forced = stages.index(from_stage) if from_stage else len(stages)
    if from_stage and forced > last:
        raise RunError(f"--from {from_stage} comes after --until {until_stage}: nothing would run")
    check_trackers(recipe.run.trackers)
    for wanted in pipeline_of(recipe)[: last + 1]:
        wanted.check(recipe)
    needs = stage_inputs(recipe)
    session = Session(recipe, console)
    session.on_step = on_step
    session.exports = "export" in stages[: last + 1]
    transfer = session.folder("transfer")
    if forced > 0 and transfer.why_not_reusable(needs["transfer"]) is None:  # otherwise transfer checks them itself
        check_schedules(recipe, len(transfer.record.mixers))
    with alone_in(session.root) if session.accelerator.is_main_process else nullcontext():
        _run_stages(session, needs, forced, last)
    return session


def _run_stages(session: Session, needs: dict[str, dict], forced: int, last: int) -> None:
    """Runs stages up to number `last`, those from number `forced` on in any case."""
    recipe, main = session.recipe, session.accelerator.is_main_process
    stages = pipeline_of(recipe)[: last + 1]
    must_run = [
        stage
        for position, stage in enumerate(stages)
        if position >= forced or session.folder(stage.name).why_not_reusable(needs[stage.name]) is not None
    ]
    for stage in must_run:
        stage.look_ahead(session)
    if main:
        try:
            recipe.save(session.root / "recipe.yaml")
            with part(OTHER) as clock:
                before = clock.start_again()
            if must_run:
                write_json(session.root / "seconds.json", before)
        except OSError as error:
            raise RunError(f"the run folder cannot be written: {error}; set run.dir to another place") from error
    accelerator = session.accelerator
    count = f"{accelerator.num_processes} process" + ("es" if accelerator.num_processes > 1 else "")
    kind = accelerator.distributed_type
    count += "" if kind == DistributedType.NO else f" ({kind.value})"
    session.say(f"{session.root}: {count} on {accelerator.device.type}, matrix products in {session.precision}")
    for position, (name, run) in enumerate((stage.name, stage.run) for stage in stages):
        folder = session.folder(name)
        reason = folder.why_not_reusable(needs[name])
        if position >= forced:
            reason = f"asked for by --from {stages[forced].name}"
        if reason is None:
            session.say(f"{name}: done before, reused")
            continue
        if position < forced and (other := finished_elsewhere(recipe, name, needs[name])) is not None:
            session.say(f"{name}: taken over from {other.path.parent}")
            if main:
                folder.take_over(other, needs[name])
            session.accelerator.wait_for_everyone()
            continue
        session.say(Text.assemble((name, "bold"), f": {reason}"))
        session.accelerator.wait_for_everyone()
        if main:
            folder.begin(needs[name], anew=position >= forced)
        session.accelerator.wait_for_everyone()
        set_seed(recipe.run.seed)
        session.anew = position >= forced
        with ticking(Clock(folder / "seconds.json" if main else None)) as clock:
            record = run(session, folder)
        if main:
            folder.finish({**record, **clock.record(), "recipe": recipe.to_dict()})
        session.accelerator.wait_for_everyone()
