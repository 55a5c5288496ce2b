"""*evaluate*: the exported checkpoint itself is measured, at each schedule, and answers; the student in its place where
torch cannot run it."""

from typing import TYPE_CHECKING, Any

from .stage import Stage

if TYPE_CHECKING:
    from ..run.folder import StageFolder
    from .session import Session


def run(session: "Session", folder: "StageFolder") -> dict:
    """Measures the exported checkpoint itself, at each schedule, and lets teacher and student answer."""
    import dataclasses

    import torch

    from ...students import HybridForCausalLM
    from ..export.card import write_card
    from ..export.formats import find_format
    from ..measure.answers import answer
    from ..measure.measures import Measuring
    from ..models import has_trans_points, load_config, load_model
    from ..report.summary import card_facts
    from ..run.files import read_json, write_json
    from ..run.seconds import part
    from .measuring import measure_schedules, refresh_quality, teacher_measures
    from .pipeline import student_before

    refresh_quality(session)
    settings = session.recipe.evaluate
    exported = session.folder("export").record
    kind = find_format(exported.folder or session.recipe.export.format)
    path = session.folder("export") / kind.name
    before = session.folder(student_before(session.recipe, "evaluate")) / "student"
    with part("loading"):
        model = (kind.load or load_model)(path) if kind.loads else load_model(before)
    model = model.to(session.accelerator.device).eval()
    late = None
    if has_trans_points(model):  # where no layer takes attention any more, or at least the layers that documents reach
        late = max((point for point in model.trans_points if point < session.held_out.longest), default=None)
    quality = session.measure(model, "evaluate", late)
    results: dict[str, Any] = {"quality": quality}
    if has_trans_points(model):
        schedules = measure_schedules(session, model, quality)
        results["schedules"] = [dataclasses.asdict(record) for record in schedules]
    texts, teacher = session.held_out_texts, None if session.recipe.from_scratch else session.teacher
    measuring = Measuring(
        session.recipe, session.tokenizer, session.held_out_data, texts, teacher, teacher or model, session.say
    )
    results["measures"] = {} if teacher is None else {"teacher": teacher_measures(session, folder, measuring)}
    results["measures"]["student"] = measuring(model)
    models = {"student": model} if teacher is None else {"teacher": session.teacher, "student": model}
    results["answers"] = [
        {"prompt": prompt}
        | {name: answer(one, session.tokenizer, prompt, settings.max_new_tokens) for name, one in models.items()}
        for prompt in settings.prompts
    ]
    if session.accelerator.is_main_process:
        write_json(folder / "results.json", results)
        if "schedules" in results:
            # So that whoever loads it at another schedule is told what was measured.
            for place in (path, before):
                config = read_json(place / "config.json") | {"measured_trans_points": results["schedules"]}
                write_json(place / "config.json", config)
        facts = dataclasses.replace(card_facts(session.root), measures=results["measures"])
        with torch.device("meta"):  # a card says nothing of weights: a large student's take long to read
            student = HybridForCausalLM._from_config(load_config(before))
        write_card(path, student, kind, exported.verified, facts)
    return results


def look_ahead(session: "Session") -> None:
    """Raises DataError or RunError where what is to be measured cannot be."""
    from ..measure.measures import check_measures

    check_measures(session.recipe, session.held_out_data, session.tokenizer)


EVALUATE = Stage("evaluate", run, reads=("evaluate", "data"), look_ahead=look_ahead)
