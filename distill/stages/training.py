"""What stages that train have in common: look ahead, train, save, measure."""

from collections.abc import Callable
from contextlib import closing

import torch

from ...students import HybridForCausalLM
from ..data.streaming import StreamedDataset
from ..data.teacher_cache import CachedDistillation
from ..run.folder import StageFolder
from ..train.engines import cut_up
from ..train.flops import peak_flops
from ..train.groups import ParameterGroup, only_these_train
from ..train.lora import attach, merge
from ..train.preflight import check_disk, check_vocabulary, flops_per_token, gpu_name, what_will_run
from ..train.protocols import Objective, TrainingData
from ..train.schedules import at_trans_points
from ..train.tracking import Tracking
from ..train.trainer import train
from .session import Session


def trained(
    session: Session,
    folder: StageFolder,
    student: HybridForCausalLM,
    objective: Objective,
    groups: list[ParameterGroup],
    trans_points: Callable[[int], list] | None = None,
) -> dict:
    """Trains, saves and measures. `trans_points`: the schedule of each step; the student is saved at its own."""
    settings = getattr(session.recipe, folder.stage)

    def before_step(step: int) -> None:
        if trans_points is not None:
            student.set_trans_points(trans_points(step), warn=False)

    cached = session.cached_targets if isinstance(objective, CachedDistillation) else None
    teacher = session.teacher if cached is None else None
    dataset: TrainingData = session.train_data if cached is None else cached
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
        session.teacher_in_training(objective) if cached is None else session.teacher_off_device(),
        closing(tracking),
    ):
        outcome = train(
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
    lora = getattr(settings, "lora", None)
    lora = lora if lora is not None and lora.rank else None
    if outcome.weights is None:
        merge(student)
        session.save(student.eval(), folder)
    else:  # they are in pieces in the modules that were trained
        whole = session.student_before(folder.stage)
        whole.config.measured_trans_points = student.config.measured_trans_points
        if lora is not None:
            attach(whole, lora)
        whole.load_state_dict(outcome.weights, strict=False)
        merge(whole)
        session.save(whole, folder)
        session.accelerator.wait_for_everyone()
        student = session.student(folder.stage)
    record = {"training": outcome.figures, "quality": session.measure(student, folder.stage)}
    if cached is not None:
        record["teacher_cache"] = {name: cached.index[name] for name in ("k", "kl", "rest_mass")}
    return record
