"""The pipeline: which stages there are, what each does, and which of them must run.

Each stage is a function of the `Session` (recipe, accelerate handle, teacher and data loaded once) and its folder.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate.utils import (
    DistributedType,
    set_seed,
)
from rich.console import Console
from rich.text import Text

from ..students import HybridForCausalLM, build_student
from ..students.configuration_transmamba import written
from ..teachers import output_head, teacher_info
from .calibrate import calibrate
from .card import write_card
from .config import Recipe
from .data import collate
from .engine import cut_up
from .export import check_tokenizer, export, why_no_student, why_not
from .files import read_json, write_json
from .flops import peak_flops
from .groups import distill_groups, mixer_parameters, only_these_train
from .identity import file_identity, identity, without_resultless
from .lora import attach, merge
from .models import has_trans_points, load_model
from .objectives import Alignment, Distillation
from .preflight import check_disk, check_prompts, check_vocabulary, flops_per_token, gpu_name, what_will_run
from .quality import answer
from .run import STAGES, STUDENT_STAGES, RunError, StageFolder, alone_in
from .schedules import (
    at_trans_points,
    check_schedules,
    measure_cost,
    never_distilled,
    resolve,
    trans_points_in_step,
)
from .session import Session
from .sources import DataError, source_identity
from .streaming import StreamedDataset
from .summary import card_facts
from .teacher_cache import CachedDistillation, cache_identity
from .tracking import Tracking, check_trackers
from .trainer import train

# What each stage reads of the recipe, besides what the stages before it read.
_SETTINGS = {
    "transfer": ("teacher", "student"),
    "calibrate": ("calibrate", "data"),
    "align": ("align", "data"),
    "distill": ("distill", "data"),
    "export": ("export",),
    "evaluate": ("evaluate", "data"),
}
# Of what each stage does. Raise one where the same settings and inputs would give another result.
_CODE = {"transfer": 1, "calibrate": 1, "align": 2, "distill": 2, "export": 1, "evaluate": 1}


def run_transfer(session: Session, folder: StageFolder) -> dict:
    """Builds the student and gives it the teacher's weights."""
    recipe = session.recipe
    config = session.teacher.config
    longest = getattr(config, "max_position_embeddings", None)
    check_schedules(recipe, config.num_hidden_layers, longest)  # better now than after training
    student = build_student(session.teacher, recipe.student)
    if session.exports and (reason := why_not(student, recipe.export.format)):
        raise RunError(f"export.format={recipe.export.format} cannot hold this student: {reason}")
    if session.exports:
        check_tokenizer(student, session.tokenizer, recipe.export.format)
        check_prompts(session.tokenizer, session.teacher, recipe)
    if line := never_distilled(recipe, student.config.mixers, longest):
        session.say(f"transfer: {line}")
    session.save(student, folder)
    if session.accelerator.is_main_process:
        (folder / "transfer_plan.txt").write_text(str(student.transfer_plan), encoding="utf-8")
    facts = {"mixers": student.config.mixers, "teacher": dataclasses.asdict(teacher_info(recipe.teacher.source))}
    return facts | {"quality": session.measure(student, "transfer")}


def run_calibrate(session: Session, folder: StageFolder) -> dict:
    """Sets decay, step and scale from a few teacher batches."""
    student = session.student("transfer")
    batches = [collate([item]) for item in session.train_data.spread(session.recipe.calibrate.sequences)]
    batches = [{key: value.to(session.accelerator.device) for key, value in batch.items()} for batch in batches]
    with at_trans_points(student, "mamba"):  # the state-space form is what is missing its decay and scale
        found = calibrate(session.teacher, student, batches, session.recipe.calibrate.decay)
    session.save(student, folder)
    return {"layers": found, "quality": session.measure(student, "calibrate")}


def run_align(session: Session, folder: StageFolder) -> dict:
    """Trains each mixer alone to give the teacher's attention output from the teacher's own input."""
    student = session.student("calibrate").train()
    objective = Alignment(session.teacher, student)
    groups = [{"name": "mixers", "parameters": mixer_parameters(student), "lr": session.recipe.align.lr}]
    return _trained(session, folder, student, objective, groups)


def run_distill(session: Session, folder: StageFolder) -> dict:
    """Trains the student end to end on the KL from the teacher's predictions."""
    settings = session.recipe.distill
    student = session.student("align").train()
    if settings.gradient_checkpointing:
        # Before 5.23, transformers calls it so.
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if settings.lora.rank:
        attach(student, settings.lora)
    if settings.teacher_cache:
        cached = session.cached_targets
        session.say(f"distill: the teacher is read from {settings.teacher_cache}: {cached.summary}")
        # A copy, which stays when the teacher leaves the device.
        head = copy.deepcopy(output_head(session.teacher, check=False)) if cached.index["hidden"] else None
        objective = CachedDistillation(student, settings, cached.index["vocab_size"], head)
    else:
        objective = Distillation(session.teacher, student, settings)
    groups = distill_groups(student, settings)
    if not groups:
        raise RunError("distill trains nothing: every group's learning rate is 0; set distill.groups or distill.lora")
    if not has_trans_points(student):
        return _trained(session, folder, student, objective, groups)
    schedules = resolve(student, [session.recipe.student.trans_points, *settings.sample_schedules])
    trained = {name: written(points) for name, points in schedules.items()} if settings.steps else {}
    student.config.measured_trans_points = [
        {"schedule": name, "trans_points": points, "trained": True, "quality": None} for name, points in trained.items()
    ]

    def trans_points(step: int) -> list:
        targets, recipe = list(schedules.values()), session.recipe
        return trans_points_in_step(step, targets, recipe.data.length, settings, recipe.run.seed)

    return _trained(session, folder, student, objective, groups, trans_points) | {"schedules": trained}


def run_export(session: Session, folder: StageFolder) -> dict:
    """Writes and verifies the checkpoint that others load."""
    _refresh_quality(session)
    if not session.accelerator.is_main_process:
        return {}
    settings = session.recipe.export
    target = folder / settings.format
    figures = export(
        session.student("distill"),
        session.tokenizer,
        target,
        settings.format,
        getattr(torch, settings.dtype),
        card_facts(session.root),
    )
    session.say(
        f"export: {target} loads without Transpoint; logits differ by {figures['logits']:.1e} from the student's, "
        f"decoding by {figures['decode']:.1e} from prefill"
    )
    return {"folder": settings.format, "verified": figures}


def run_evaluate(session: Session, folder: StageFolder) -> dict:
    """Measures the exported checkpoint itself, at each schedule, and lets teacher and student answer."""
    _refresh_quality(session)
    settings = session.recipe.evaluate
    exported = session.folder("export").done
    path = session.folder("export") / exported["folder"]
    model = load_model(path).to(session.accelerator.device)
    late = None
    if has_trans_points(model):  # where no layer takes attention any more, or at least the layers that documents reach
        late = max((point for point in model.trans_points if point < session.held_out.longest), default=None)
    results = {"quality": session.measure(model, "evaluate", late)}
    if has_trans_points(model):
        results["schedules"] = _measure_schedules(session, model, results["quality"])
    results["answers"] = [
        {
            "prompt": prompt,
            "teacher": answer(session.teacher, session.tokenizer, prompt, settings.max_new_tokens),
            "student": answer(model, session.tokenizer, prompt, settings.max_new_tokens),
        }
        for prompt in settings.prompts
    ]
    if session.accelerator.is_main_process:
        write_json(folder / "results.json", results)
        if "schedules" in results:
            # So that whoever loads it at another schedule is told what was measured.
            for place in (path, session.folder("distill") / "student"):
                config = read_json(place / "config.json") | {"measured_trans_points": results["schedules"]}
                write_json(place / "config.json", config)
            model.config.measured_trans_points = results["schedules"]
            write_card(path, model, exported["folder"], exported["verified"], card_facts(session.root))
    return results


def _measure_schedules(session: Session, model: HybridForCausalLM, own: dict) -> list[dict]:
    """Quality and cost at each schedule: those it was trained on first; `own` is the quality at its own."""
    recipe = session.recipe
    length = recipe.evaluate.cost_length or recipe.data.length
    trained = session.folder("distill").done["schedules"]
    others = ["teacher", "mamba"] if recipe.evaluate.schedules is None else recipe.evaluate.schedules
    specs = [recipe.student.trans_points, *recipe.distill.sample_schedules, *others]
    records, never = [], set()
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


_RUN = {
    "transfer": run_transfer,
    "calibrate": run_calibrate,
    "align": run_align,
    "distill": run_distill,
    "export": run_export,
    "evaluate": run_evaluate,
}


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
    last = STAGES.index(until_stage or STAGES[-1])
    forced = STAGES.index(from_stage) if from_stage else len(STAGES)
    if from_stage and forced > last:
        raise RunError(f"--from {from_stage} comes after --until {until_stage}: nothing would run")
    check_trackers(recipe.run.trackers)
    needs = stage_inputs(recipe)
    session = Session(recipe, console)
    session.on_step = on_step
    session.exports = last >= STAGES.index("export")
    if session.exports and (reason := why_no_student(recipe.export.format, recipe.student)):
        raise RunError(f"export.format={recipe.export.format} cannot hold this student: {reason}")
    transfer = session.folder("transfer")
    if forced > 0 and transfer.why_not_reusable(needs["transfer"]) is None:  # otherwise transfer checks them itself
        check_schedules(recipe, len(transfer.done["mixers"]))
    with alone_in(session.root) if session.accelerator.is_main_process else nullcontext():
        _run_stages(session, needs, forced, last)
    return session


def _run_stages(session: Session, needs: dict[str, dict], forced: int, last: int) -> None:
    """Runs stages up to number `last`, those from number `forced` on in any case."""
    recipe, main = session.recipe, session.accelerator.is_main_process
    if main:
        try:
            recipe.save(session.root / "recipe.yaml")
        except OSError as error:
            raise RunError(f"the run folder cannot be written: {error}; set run.dir to another place") from error
    distill = STAGES.index("distill")
    runs_distill = forced <= distill or session.folder("distill").why_not_reusable(needs["distill"]) is not None
    if recipe.distill.teacher_cache and last >= distill and runs_distill:
        _ = session.cached_targets  # one that does not fit is refused now, not after the stages before
    accelerator = session.accelerator
    count = f"{accelerator.num_processes} process" + ("es" if accelerator.num_processes > 1 else "")
    kind = accelerator.distributed_type
    count += "" if kind == DistributedType.NO else f" ({kind.value})"
    session.say(f"{session.root}: {count} on {accelerator.device.type}, matrix products in {session.precision}")
    for position, stage in enumerate(STAGES[: last + 1]):
        folder = session.folder(stage)
        reason = folder.why_not_reusable(needs[stage])
        if position >= forced:
            reason = f"asked for by --from {STAGES[forced]}"
        if reason is None:
            session.say(f"{stage}: done before, reused")
            continue
        if position < forced and (other := finished_elsewhere(recipe, stage, needs[stage])) is not None:
            session.say(f"{stage}: taken over from {other.path.parent}")
            if main:
                folder.take_over(other, needs[stage])
            session.accelerator.wait_for_everyone()
            continue
        session.say(Text.assemble((stage, "bold"), f": {reason}"))
        session.accelerator.wait_for_everyone()
        if main:
            folder.begin(needs[stage], anew=position >= forced)
        session.accelerator.wait_for_everyone()
        set_seed(recipe.run.seed)
        begun = time.monotonic()
        record = _RUN[stage](session, folder)
        if main:
            seconds = round(time.monotonic() - begun, 1)
            folder.finish({**record, "stage_seconds": seconds, "recipe": recipe.to_dict()})
        session.accelerator.wait_for_everyone()


def finished_elsewhere(recipe: Recipe, stage: str, depends_on: dict) -> StageFolder | None:
    """The folder of a run in `run.reuse` that has finished a stage which depends on just this."""
    folders = (StageFolder(Path(root).expanduser(), stage) for root in recipe.run.reuse)
    return next((folder for folder in folders if folder.why_not_reusable(depends_on) is None), None)


def stage_inputs(recipe: Recipe) -> dict[str, dict]:
    """For each stage, all that its result depends on: settings, seed, files, what it does, and the stage before it."""
    settings = recipe.to_dict()
    for name in ("train", "heldout"):
        if not settings["data"][name]:
            raise DataError(f"data.{name} is empty: list files, folders or hub:OWNER/NAME there")
    text = {
        "train": [source_identity(source, sampled=recipe.data.streaming) for source in recipe.data.train],
        "heldout": [source_identity(source) for source in recipe.data.heldout],
    }
    needs: dict[str, dict] = {}
    before = None
    for stage in STAGES:
        own = {name: dict(settings[name]) for name in _SETTINGS[stage]} | {"code": _CODE[stage]}
        if "data" in own:
            own["data"] |= text
            # What is trained does not depend on what it is measured on.
            unread = ["cache"] if stage == "evaluate" else ["cache", "heldout", "max_heldout_tokens"]
            if stage == "evaluate" or not recipe.data.streaming:
                unread += ["streaming", "shuffle_buffer"]
            for name in unread:
                del own["data"][name]
        if stage == "distill" and recipe.distill.teacher_cache:
            own["distill"]["teacher_cache"] = cache_identity(recipe.distill.teacher_cache)
        if "teacher" in own:
            own["teacher"]["files"] = file_identity(recipe.teacher.source)
            for name in ("share", "training_dtype"):
                del own["teacher"][name]
        if stage in ("align", "distill"):
            own["run"] = {"seed": recipe.run.seed, "precision": recipe.run.precision}
            own["teacher"] = {"training_dtype": recipe.teacher.training_dtype}
        own = without_resultless(own)
        if before is not None:
            own["after"] = {before: identity(needs[before])}
        needs[stage] = own
        before = stage
    return needs


def _refresh_quality(session: Session) -> None:
    """Measures again what earlier runs measured on other held-out sequences, the teacher included."""
    main, teacher = session.accelerator.is_main_process, session.root / "teacher_quality.json"
    if (read_json(teacher) or {}).get("measured_on") != session.measured_on:
        quality = session.measure(session.teacher, "teacher")
        if main:
            write_json(teacher, quality)
    for stage in STUDENT_STAGES:
        done = session.folder(stage).done
        if done["quality"]["measured_on"] != session.measured_on:
            done["quality"] = session.measure(session.student(stage), stage)
            if main:
                write_json(session.folder(stage) / "done.json", done)
    session.accelerator.wait_for_everyone()


def _trained(
    session: Session,
    folder: StageFolder,
    student: HybridForCausalLM,
    objective: torch.nn.Module,
    groups: list[dict],
    trans_points: Callable[[int], list] | None = None,
) -> dict:
    """Trains, saves and measures. `trans_points`: the schedule of each step; the student is saved at its own."""
    settings = getattr(session.recipe, folder.stage)

    def before_step(step: int) -> None:
        if trans_points is not None:
            student.set_trans_points(trans_points(step), warn=False)

    cached = isinstance(objective, CachedDistillation)
    teacher = None if cached else session.teacher
    dataset = session.cached_targets if cached else session.train_data
    accelerator, gpu = session.accelerator, gpu_name(session.accelerator.device)
    only_these_train(student, groups)
    check_vocabulary(session.tokenizer, student, "student")
    check_disk(session.root, groups, student, settings)
    processes = accelerator.num_processes, cut_up(accelerator)
    session.console.print(what_will_run(folder.stage, groups, student, teacher, session.recipe, *processes, gpu))
    tracking = Tracking(accelerator, session.recipe, folder.stage, folder)
    cost = flops_per_token(folder.stage, teacher, student, session.recipe.data.length)
    peak = peak_flops(gpu, torch.bfloat16 if session.precision == "bf16" else torch.float32) if gpu else None

    def log(figures: dict) -> None:
        if peak is not None and cost is not None:
            figures["mfu"] = cost * figures["tokens_per_second"] / (peak * accelerator.num_processes)
        if gpu is not None:
            figures["memory"] = torch.cuda.max_memory_allocated()
        tracking.log(figures)

    del teacher  # or it would be held while it is loaded again
    with (
        at_trans_points(student),
        session.teacher_off_device() if cached else session.teacher_in_training(objective),
        closing(tracking),
    ):
        trained = train(
            objective,
            groups,
            settings,
            dataset,
            folder,
            session.accelerator,
            session.console,
            session.recipe.run.seed,
            session.on_step,
            before_step,
            session.precision,
            session.recipe.run.compile,
            log,
        )
    if isinstance(dataset, StreamedDataset) and dataset.documents.skipped:
        session.say(f"train text: {dataset.summary()}")
    lora = settings.lora if folder.stage == "distill" and settings.lora.rank else None
    if trained.weights is None:
        merge(student)
        session.save(student.eval(), folder)
    else:  # they are in pieces in the modules that were trained
        whole = session.student(STUDENT_STAGES[STUDENT_STAGES.index(folder.stage) - 1])
        whole.config.measured_trans_points = student.config.measured_trans_points
        if lora is not None:
            attach(whole, lora)
        whole.load_state_dict(trained.weights, strict=False)
        merge(whole)
        session.save(whole, folder)
        session.accelerator.wait_for_everyone()
        student = session.student(folder.stage)
    record = {"training": trained.figures, "quality": session.measure(student, folder.stage)}
    return record | (
        {"teacher_cache": {name: dataset.index[name] for name in ("k", "kl", "rest_mass")}} if cached else {}
    )
