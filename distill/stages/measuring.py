"""What *export* and *evaluate* measure again, and at which TransPoints."""

import dataclasses
import math
from pathlib import Path

from ...students import HybridForCausalLM
from ...students.modeling.configuration_transmamba import written
from ..measure.cost import measure_cost
from ..measure.measures import Measuring
from ..run.files import read_json, write_json
from ..run.folder import StageFolder
from ..run.identity import identity
from ..run.records import Measures, Quality, ScheduleRecord, read_record
from ..trans_points import at_trans_points, resolve
from .pipeline import pipeline_of
from .session import Session


def refresh_quality(session: Session) -> None:
    """Measures again what earlier runs measured on other held-out sequences, a teacher included."""
    main, teacher = session.accelerator.is_main_process, session.root / "teacher_quality.json"
    if session.recipe.from_scratch:
        pass
    elif read_record(Quality, read_json(teacher)).measured_on != session.measured_on:
        quality = session.measure(session.teacher, "teacher")
        if main:
            write_json(teacher, quality)
    for stage in [stage.name for stage in pipeline_of(session.recipe) if stage.makes_student]:
        folder = session.folder(stage)
        before = folder.record.quality
        if before is None or before.measured_on != session.measured_on:
            quality = session.measure(session.student(stage), stage)
            if main:
                write_json(folder / "done.json", (folder.done or {}) | {"quality": quality})
    session.accelerator.wait_for_everyone()


def teacher_measures(session: Session, folder: StageFolder, measuring: Measuring) -> Measures:
    """Of the teacher, from this run or one in `run.reuse` that measured the same of it. Its cost is measured anew, as
    times compare within one run alone."""
    measured = {name: value for name, value in (folder.started or {}).items() if name != "after"}
    if "data" in measured:  # of which the text that students are trained on is nothing to the teacher
        trained = ("train", "max_train_tokens", "streaming", "shuffle_buffer")
        measured["data"] = {name: value for name, value in measured["data"].items() if name not in trained}
    teacher = (session.folder("transfer").started or {}).get("teacher")
    on = identity({"measured": measured, "teacher": teacher, "device": session.accelerator.device.type})
    own = session.root / "teacher_measures.json"
    others = [Path(root).expanduser() / own.name for root in session.recipe.run.reuse]
    for place in others if session.anew else [own, *others]:
        found = read_json(place)
        if isinstance(found, dict) and found.get("measured_on") == on:
            measures = read_record(Measures, found.get("measures"))
            break
    else:
        measures = measuring(session.teacher)
    if session.accelerator.is_main_process:
        write_json(own, {"measured_on": on, "measures": dataclasses.replace(measures, costs=[])})
    return measures if measures.costs else dataclasses.replace(measures, costs=measuring.costs(session.teacher))


def measure_schedules(session: Session, model: HybridForCausalLM, own: Quality) -> list[ScheduleRecord]:
    """Quality and cost at each schedule: those it was trained on first; `own` is the quality at its own."""
    recipe = session.recipe
    length = recipe.evaluate.cost_length or recipe.data.length
    done = [session.folder(stage.name).record for stage in pipeline_of(recipe) if stage.trains]
    trained = next((record.trained_schedules for record in reversed(done) if record.trained_schedules), {})
    unasked = ["inf" if recipe.from_scratch else "teacher", "mamba"]
    others = unasked if recipe.evaluate.schedules is None else recipe.evaluate.schedules
    specs = [recipe.student.trans_points, *recipe.distill.sample_schedules, *others]
    records: list[ScheduleRecord] = []
    never: set[int | float] = set()
    for name, points in resolve(model, specs).items():
        with at_trans_points(model, points):
            quality = session.measure(model, f"evaluate at {name}", own.late) if records else own
            cost = measure_cost(model, length, trans_points=points)
        as_written = written(points)
        records.append(
            ScheduleRecord(name, as_written, as_written in trained.values(), session.held_out.longest, quality, cost)
        )
        never |= {point for point in points if session.held_out.longest <= point < math.inf}
    if never:
        session.say(
            f"evaluate: the longest held-out document has {session.held_out.longest:,} tokens, so TransPoints of "
            f"{', '.join(map(str, sorted(never)))} are never passed: quality says nothing of the state-space form "
            "there; raise data.length, or give longer held-out documents"
        )
    return records
