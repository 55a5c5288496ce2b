"""What *export* and *evaluate* measure again, and at which TransPoints."""

import dataclasses
import math

from ...students import HybridForCausalLM
from ...students.modeling.configuration_transmamba import written
from ..report.cost import measure_cost
from ..run.files import read_json, write_json
from ..train.schedules import at_trans_points, resolve
from .pipeline import pipeline_of
from .session import Session


def refresh_quality(session: Session) -> None:
    """Measures again what earlier runs measured on other held-out sequences, the teacher included."""
    main, teacher = session.accelerator.is_main_process, session.root / "teacher_quality.json"
    if (read_json(teacher) or {}).get("measured_on") != session.measured_on:
        quality = session.measure(session.teacher, "teacher")
        if main:
            write_json(teacher, quality)
    for stage in [stage.name for stage in pipeline_of(session.recipe) if stage.makes_student]:
        done = session.folder(stage).results
        if done["quality"]["measured_on"] != session.measured_on:
            done["quality"] = session.measure(session.student(stage), stage)
            if main:
                write_json(session.folder(stage) / "done.json", done)
    session.accelerator.wait_for_everyone()


def measure_schedules(session: Session, model: HybridForCausalLM, own: dict) -> list[dict]:
    """Quality and cost at each schedule: those it was trained on first; `own` is the quality at its own."""
    recipe = session.recipe
    length = recipe.evaluate.cost_length or recipe.data.length
    done = [session.folder(stage.name).done or {} for stage in pipeline_of(recipe) if stage.trains]
    trained: dict = next((record["schedules"] for record in reversed(done) if "schedules" in record), {})
    others = ["teacher", "mamba"] if recipe.evaluate.schedules is None else recipe.evaluate.schedules
    specs = [recipe.student.trans_points, *recipe.distill.sample_schedules, *others]
    records: list[dict] = []
    never: set[int | float] = set()
    for name, points in resolve(model, specs).items():
        with at_trans_points(model, points):
            quality = session.measure(model, f"evaluate at {name}", own["late"]) if records else own
            cost = measure_cost(model, points, length)
        quality = {key: value for key, value in quality.items() if key != "measured_on"}
        record = {"schedule": name, "trans_points": written(points), "trained": written(points) in trained.values()}
        record |= {"longest": session.held_out.longest}  # tokens of a document: no TransPoint from there on is passed
        records.append(record | {"quality": quality, "cost": dataclasses.asdict(cost)})
        never |= {point for point in points if session.held_out.longest <= point < math.inf}
    if never:
        session.say(
            f"evaluate: the longest held-out document has {session.held_out.longest:,} tokens, so TransPoints of "
            f"{', '.join(map(str, sorted(never)))} are never passed: quality says nothing of the state-space form "
            "there; raise data.length, or give longer held-out documents"
        )
    return records
