"""What stages that train have in common: look ahead, train, save, measure."""

from collections.abc import Callable
from contextlib import closing

import torch
from transformers import PreTrainedModel

from ...students import HybridForCausalLM
from ..data.streaming import StreamedDataset
from ..errors import RunError
from ..run.folder import StageFolder
from ..train.engines import sharded
from ..train.flops import peak_flops
from ..train.groups import ParameterGroup, only_these_train
from ..train.lora import attach, merge
from ..train.protocols import Objective, TrainingData
from ..train.tracking import Tracking
from ..train.trainer import train
from ..trans_points import at_trans_points
from .pipeline import stage_of
from .preflight import check_disk, check_vocabulary, flops_per_token, gpu_name, what_will_run
from .session import Session


def end_to_end(session: Session, folder: StageFolder) -> tuple[HybridForCausalLM, list[ParameterGroup]]:
    """The student that a stage trains as a whole, ready for it, and the groups that it trains.

    Raises RunError where these are none.
    """
    stage = stage_of(folder.stage)
    student = session.student_before(stage.name).train()
    if stage.of(session.recipe).gradient_checkpointing:
        # Before 5.23, transformers calls it so.
        enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    assert stage.groups is not None
    if groups := stage.groups(student, session.recipe):
        return student, groups
    raise RunError(
        f"{stage.name} trains nothing: every group's learning rate is 0; set {stage.name}.groups or {stage.name}.lora"
    )


def trained(
    session: Session,
    folder: StageFolder,
    student: HybridForCausalLM,
    groups: list[ParameterGroup],
    objective: Callable[[PreTrainedModel], Objective],
    data: TrainingData | None = None,
    trans_points: Callable[[int], list] | None = None,
) -> dict:
    """Trains, saves and measures.

    Args:
        objective: takes the teacher, makes what is minimised.
        data: what it is trained on, where that is not the run's training text.
        trans_points: the schedule of each step; the student is saved at its own.
    """
    settings, accelerator = getattr(session.recipe, folder.stage), session.accelerator
    if not groups:
        session.say(f"{folder.stage}: every mixer is one of transfer.start: there is none to train")
        session.save(student.eval(), folder)
        return {"quality": session.measure(student, folder.stage)}
    takes_teacher = stage_of(folder.stage).takes_teacher(session.recipe)

    def before_step(step: int) -> None:
        if trans_points is not None:
            student.set_trans_points(trans_points(step), warn=False)

    only_these_train(student, groups)
    use = _look_ahead(session, folder, student, groups, takes_teacher)
    dataset = session.text_of(folder.stage) if data is None else data
    tracking = Tracking(accelerator, session.recipe, folder.stage, folder)

    def log(metrics: dict) -> None:
        metrics |= use(metrics)
        tracking.log(metrics)

    with (
        at_trans_points(student),
        session.teacher_for_training() if takes_teacher else session.teacher_off_device(),
        closing(tracking),
    ):
        outcome = train(
            objective(session.teacher),  # held by nothing here: it goes with the teacher that training has
            groups,
            settings,
            dataset,
            folder,
            accelerator,
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
    lora = getattr(settings, "lora", None)
    lora = lora if lora is not None and lora.rank else None
    if outcome.weights is None:
        merge(student)
        session.save(student.eval(), folder)
    else:  # they are in pieces in the modules that were trained
        whole = session.student_before(folder.stage)
        whole.config.measured_trans_points = student.config.measured_trans_points
        if lora is not None:
            attach(whole, lora, folder.stage)
        whole.load_state_dict(outcome.weights, strict=False)
        merge(whole)
        session.save(whole, folder)
        accelerator.wait_for_everyone()
        student = session.student(folder.stage)
    return {"training": outcome.metrics, "quality": session.measure(student, folder.stage)}


def _look_ahead(
    session: Session,
    folder: StageFolder,
    student: HybridForCausalLM,
    groups: list[ParameterGroup],
    takes_teacher: bool,
) -> Callable[[dict], dict]:
    """Says what will be trained and what that needs, and refuses what cannot end well. Returns what a device's use of a
    step is found by, from the step's metrics."""
    settings, accelerator = getattr(session.recipe, folder.stage), session.accelerator
    teacher, gpu = session.teacher if takes_teacher else None, gpu_name(accelerator.device)
    check_vocabulary(session.tokenizer, student, "student")
    check_disk(session.root, groups, student, settings)
    processes = accelerator.num_processes
    parts = processes, sharded(accelerator), gpu
    what = what_will_run(folder.stage, groups, student, teacher, session.recipe, session.precision, *parts)
    session.console.print(what)
    if gpu is None:
        return lambda metrics: {}
    cost = flops_per_token(folder.stage, teacher, student, session.recipe.length_in(folder.stage))
    peak = peak_flops(gpu, torch.bfloat16 if session.precision == "bf16" else torch.float32)

    def use(metrics: dict) -> dict:
        found: dict = {"memory": torch.cuda.max_memory_allocated()}
        if peak is not None and cost is not None:
            found["mfu"] = cost * metrics["tokens_per_second"] / (peak * processes)
        return found

    return use
