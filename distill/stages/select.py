"""*select*: which layers keep attention. Off unless student.keep_attention asks for it ("select:0.5")."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...students.config import asks_to_select, count_to_select
from ..errors import RunError
from ..settings import setting
from .stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ...students.config import StudentConfig
    from ..config import Recipe
    from ..run.folder import StageFolder
    from ..run.records import LayerScore, Selection
    from ..selection.stand_ins import StandIn
    from ..train.calibration import Fit
    from .session import Session

FITS = "fits.safetensors"  # what calibrating the mixer of each layer has found, where layers are judged by mixers


@dataclass
class SelectConfig:
    kl_with: str = setting(
        "mixer",
        "what takes the place of attention where KL is measured: mixer (the student's, calibrated) or window (the "
        "teacher's own attention of the last tokens alone)",
        choices=("mixer", "window"),
    )
    recall_with: str = setting("window", "the same where recall is measured", choices=("mixer", "window"))
    window: int = setting(64, "tokens that a window holds", minimum=1)
    sinks: int = setting(0, "first tokens of a text that it sees besides", minimum=0)
    search: str = setting(
        "single",
        "single (each layer on its own), add (from none, the best layers get attention one by one), remove (from all, "
        "those that it costs least give it up), or gates (trained jointly under a growing pressure to close)",
        choices=("single", "add", "remove", "gates"),
    )
    gate_steps: int = setting(100, "in which gates are trained", minimum=1)
    gate_lr: float = setting(0.1, "learning rate of the gates' logits", above=0)
    gate_pressure: float = setting(10.0, "on the mean of all gates in the last step, in nats", above=0)
    beam: int = setting(1, "sets of layers that add and remove follow at a time", minimum=1)
    kl_weight: float = setting(1.0, "weight of the KL (nats a token of text) in what a layer is worth", minimum=0)
    recall_weight: float = setting(
        1.0, "weight of recall: what a token of an answer loses in log-probability, nats", minimum=0
    )
    error_weight: float = setting(
        0.0, "weight of the calibrated mixer's error: relative and squared, of what heads read", minimum=0
    )
    length: int = setting(1024, "tokens of the texts that are judged on", minimum=16)
    sequences: int = setting(8, "texts for the KL", minimum=1)
    items: int = setting(16, "texts with numbers to be found again, for recall", minimum=1)


def run(session: "Session", folder: "StageFolder") -> dict:
    """Scores layers by what it costs the teacher to do without their attention; finds, for any number of them, those
    that should keep it."""
    from ..measure.recall import KEYS, keys_in_text
    from ..run.progress import Progress
    from ..run.seconds import part
    from ..selection.gates import trained_gates
    from ..selection.judge import Judge
    from ..selection.search import by_gates, jointly, most_sets, one_by_one
    from ..selection.stand_ins import windows

    config, settings = session.teacher.config, SELECT.of(session.recipe)
    layers = config.num_hidden_layers
    count = count_to_select(session.recipe.student.keep_attention, layers)
    longest = getattr(config, "max_position_embeddings", None) or settings.length
    if longest < settings.length:
        session.say(f"select: texts of {longest:,} tokens, as the teacher takes no longer ones")
        settings = dataclasses.replace(settings, length=longest)
    texts = _texts(session, settings)
    items = keys_in_text(session.tokenizer, texts.flatten(), settings.length, settings.items, KEYS)

    def loss(score: "LayerScore") -> float:
        parts = ((settings.kl_weight, score.kl), (settings.recall_weight, score.recall))
        return sum(weight * (part or 0.0) for weight, part in (*parts, (settings.error_weight, score.error)))

    # Before the teacher is in the form that training has of it: views are checked, and students made, of whole weights.
    stand_ins = {"window": windows(session.teacher, settings.window, settings.sinks)}
    errors: dict[int, float] = {}
    if needs_mixers(settings):
        stand_ins["mixer"], errors = _calibrated_mixers(session, folder)
    on_text, on_items = stand_ins[settings.kl_with], stand_ins[settings.recall_with]

    def search() -> "Selection":
        joint, measured = settings.search in ("add", "remove"), itertools.count(1)
        judge = Judge(
            session.teacher,
            on_text,
            on_items,
            texts,
            items,
            errors,
            on_measured=lambda: progress.show(next(measured)),
            bf16=session.precision == "bf16",
        )
        steps = settings.gate_steps if settings.search == "gates" else 0
        total = (steps + most_sets(len(on_text), settings.beam if joint else None)) * len(judge.passes)
        tokens = sum(one.ids.numel() for one in judge.passes) // len(judge.passes)
        with Progress(session.console, "select", total, 0, tokens) as progress:
            if joint:
                return jointly(judge, loss, settings.beam, settings.search == "add")
            if not steps:
                return one_by_one(judge, loss)
            rates = settings.gate_lr, settings.gate_pressure
            gates = trained_gates(judge, steps, *rates, settings.kl_weight, settings.recall_weight)
            return by_gates(judge, loss, gates)

    # Of rounded weights comes a rounded residual stream, which moves scores by as much as layers differ. On a GPU that
    # is the price of a search in seconds; on a CPU it would save little.
    rounded = session.accelerator.device.type == "cuda"
    with session.teacher_for_training(rounded), part("searching"):
        found = search()
    if broken := [layer for layer, score in found.alone.items() if not math.isfinite(loss(score))]:
        raise RunError(
            f"without the attention of layer {broken[0]} the teacher's predictions are not finite: its weights may be "
            "damaged; try teacher.training_dtype=float32, or choose layers by hand"
        )
    worst, score = max(found.alone.items(), key=lambda entry: loss(entry[1]))
    kept = ", ".join(map(str, found.kept[str(count)])) or "none"
    session.say(
        f"select: attention is kept in {kept} of {layers} layers; the teacher misses that of layer {worst} most: "
        f"without it, KL {score.kl:.4f}, and {score.recall:.2f} nats for each token of an answer"
    )
    return {"selection": found}


def selected(recipe: "Recipe", folder: "StageFolder", layers: int) -> "StudentConfig":
    """What a recipe says of the student, with the layers that the stage has chosen where it asks for that.

    Raises RunError where the stage has not chosen any.
    """
    count = count_to_select(recipe.student.keep_attention, layers)
    if count is None:
        return recipe.student
    selection = folder.record.selection
    kept = None if selection is None else selection.kept.get(str(count))
    if kept is None:
        raise RunError(
            f"student.keep_attention is '{recipe.student.keep_attention}', and no layers have been chosen in "
            f"{folder.path}: run the recipe, with --from select if it has run"
        )
    return dataclasses.replace(recipe.student, keep_attention=kept)


def as_far_as_known(recipe: "Recipe", layers: int) -> "tuple[StudentConfig, str | None]":
    """The same before the stage has run: as many layers, evenly spaced, and a line that says so."""
    from ..data.sources import DataError
    from ..run.folder import StageFolder
    from .inputs import stage_inputs

    folder = StageFolder(Path(recipe.run.dir), SELECT.name)
    count = count_to_select(recipe.student.keep_attention, layers)
    if count is None:
        return recipe.student, None
    try:
        if folder.why_not_reusable(stage_inputs(recipe)[SELECT.name]) is None:
            return selected(recipe, folder, layers), None
    except DataError:  # no text has been named yet
        pass
    even = dataclasses.replace(recipe.student, keep_attention=count / layers)
    return even, f"which {count} layers keep attention is for select to find: here they are evenly spaced"


def _texts(session: "Session", settings: SelectConfig) -> "Tensor":
    """Training text, (n, length): in sequences of the stage's own length."""
    import torch

    from ..data.packed import PackedDataset

    data, length = session.train_data, settings.length
    if isinstance(data, PackedDataset):
        return torch.stack(
            [item["input_ids"] for item in PackedDataset(data.corpus, length).spread(settings.sequences)]
        )
    windows = data.spread(-(-settings.sequences * length // session.recipe.data.length))
    tokens = torch.cat([window["input_ids"] for window in windows])
    return tokens[: len(tokens) // length * length].view(-1, length)


def found_before(session: "Session") -> "dict[int, Fit]":
    """What the stage has found, by layer, for mixers that *transfer* makes of the teacher's attention."""
    from ..train.calibration import read_fits
    from .transfer import start_folder

    if not SELECT.wanted(session.recipe) or start_folder(session.recipe) is not None:
        return {}
    return read_fits(session.folder(SELECT.name) / FITS, session.accelerator.device)


def _calibrated_mixers(session: "Session", folder: "StageFolder") -> "tuple[dict[int, StandIn], dict[int, float]]":
    """The mixers of a student whose layers are all mixers, calibrated, and how far each is from attention."""
    from ...students import build_student
    from ..selection.stand_ins import mixers
    from ..train.calibration import calibrate, save_fits

    recipe = session.recipe
    # With TransPoints, the state-space form: it is what has no attention.
    every = dataclasses.replace(recipe.student.without_attention(), trans_points="mamba")
    student = build_student(session.teacher, every).float().requires_grad_(False)
    found = calibrate(session.teacher, student, session.calibration_batches(), recipe.calibrate.decay)
    if session.accelerator.is_main_process:
        save_fits(found, folder / FITS)
    return mixers(student), {layer: fit.error.item() for layer, fit in found.items()}


def needs_mixers(settings: SelectConfig) -> bool:
    """Whether scores depend on the student's mixers."""
    return "mixer" in (settings.kl_with, settings.recall_with) or settings.error_weight > 0


def check(recipe: "Recipe") -> None:
    """Refuses scores that are all 0."""
    settings = SELECT.of(recipe)
    decay = recipe.student.kind.load().has_decay  # without it `calibrate` finds no errors
    weights = settings.kl_weight + settings.recall_weight + (settings.error_weight if decay else 0)
    if weights == 0:
        raise RunError(
            "select has nothing to go by: set select.kl_weight or select.recall_weight above 0"
            + ("" if decay else f" (a {recipe.student.mixer} mixer has no error that calibrate measures)")
        )


def unread(recipe: "Recipe") -> tuple[str, ...]:
    if needs_mixers(SELECT.of(recipe)):
        return ("student.keep_attention", "student.trans_points")
    return ("student", "calibrate")


SELECT: Stage = Stage(
    "select",
    run,
    reads=("teacher", "student", "calibrate", "select", "data"),
    settings=SelectConfig,
    wanted=lambda recipe: asks_to_select(recipe.student.keep_attention),
    unread=unread,
    check=check,
    in_precision=True,
    needs_teacher=True,
)
