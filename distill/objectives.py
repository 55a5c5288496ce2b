"""What the training stages minimise: modules whose `forward(batch)` gives a loss and named metrics.

The teacher is held beside the module, not in it: it is never wrapped, moved, optimised or saved with it.

Of each, `compiled` asks which models take part, what of it can be compiled, and what besides a batch's shapes the work
of a pass depends on.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.kl import linear_kl
from ..kernels.kl_cached import cached_kl
from ..kernels.matching import mixing_distance
from ..students import HybridForCausalLM, Mixer
from ..students.modeling.configuration_mixers import have_trans_points
from ..students.modeling.documents import Documents, Spans, document_index, document_mask, flex_options
from ..teachers import OutputHead, attention_view, output_head
from .settings import DistillConfig
from .train.compiled import FLEX
from .train.groups import trained_mixers

if TYPE_CHECKING:
    from ..students.modeling.documents import Spanned
    from .stages.tune import TuneConfig


class Alignment(nn.Module):
    """Each mixer that trains alone, all layers at once: the teacher's attention output from the teacher's own input.

    The loss is the mean over layers and sequences of ||mixer(h) - attention(h)||^2 / ||attention(h)||^2: relative L2,
    as in MOHAWK's second stage (arXiv 2408.10189), which takes whole blocks. Figures: one `layer_N` for each mixer.

    A TransMamba mixer has two forms of one set of weights: to the loss of the state-space form (T = 0) it adds that of
    the attention form (T = infinity), so that this stays the teacher's while the weights learn to serve both; further
    metrics `attention_N`. Training only what the state-space form has for itself is left far behind
    (docs/transmamba.md).
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM):
        super().__init__()
        layers = trained_mixers(student)
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in layers.items()})
        self.beside: tuple[Any, ...] = (
            teacher,
            [view for view in attention_view(teacher, check=False) if view.layer in layers],
        )
        self.error = relative_error

    def models(self) -> list[PreTrainedModel]:
        return [self.beside[0]]

    def compilable(self) -> list[tuple[object, str]]:
        """Mixers, their errors, and parts of the teacher's layers: attention is looked into from between them."""
        parts = (part for layer in self.beside[0].get_decoder().layers for part in layer.children())
        return [(self, "error"), *((part, "forward") for part in (*self.mixers.values(), *parts))]

    def kind(self) -> tuple:
        return ()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, views = self.beside
        pairs = attention_pairs(teacher, views, batch)
        seq_idx = document_index(batch["position_ids"])
        fused = teacher.config._attn_implementation == FLEX
        documents = None if fused else Documents(seq_idx)  # once for all mixers, as it waits for the device
        spans = Spans(seq_idx) if fused else None
        metrics: dict[str, Tensor] = {}
        for view in views:
            inputs, output, position_embeddings = pairs[view.layer]
            mixer = cast(Mixer, self.mixers[str(view.layer)])
            for form in mixer.forms():
                with mixer.at(form.trans_point):
                    where: dict[str, Any] = {"seq_idx": seq_idx, "documents": documents}
                    if spans is not None and mixer.spanned:
                        where["span"] = spans.of(cast("Spanned", mixer))
                    found = mixer(inputs, position_embeddings, **where)[0]
                metrics[f"{form.name}_{view.layer}"] = self.error(found, output)
        return cast(Tensor, sum(metrics.values())) / len(views), metrics


class Orientation(nn.Module):
    """Each mixer that trains alone, all layers at once: the teacher's attention matrix by that of the state-space form.

    The loss is the mean over layers and heads of ||mixer's matrix - attention's||_F^2 / ||attention's||_F^2, from the
    teacher's own input: MOHAWK's first stage, matrix orientation (arXiv 2408.10189), squared, and relative as
    `Alignment` is. Figures: one `layer_N` for each mixer that has a matrix.
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM):
        super().__init__()
        mixers = {layer: mixer for layer, mixer in trained_mixers(student).items() if mixer.matrix}
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self.beside: tuple[Any, ...] = (
            teacher,
            [view for view in attention_view(teacher, check=False) if view.layer in mixers],
        )

    def models(self) -> list[PreTrainedModel]:
        return [self.beside[0]]

    def compilable(self) -> list[tuple[object, str]]:
        return [(part, "forward") for layer in self.beside[0].get_decoder().layers for part in layer.children()]

    def kind(self) -> tuple:
        return ()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, views = self.beside
        pairs = attention_pairs(teacher, views, batch)
        seq_idx = document_index(batch["position_ids"])
        metrics: dict[str, Tensor] = {}
        for view in views:
            inputs, _, position_embeddings = pairs[view.layer]
            with torch.no_grad():
                q, k, _ = view.project(inputs.to(view.q_proj.weight.dtype), position_embeddings)
            own = cast(Mixer, self.mixers[str(view.layer)]).mixing(inputs, position_embeddings, seq_idx)
            where = {"scale": view.scale, "seq_idx": seq_idx, "window": view.window}
            distance, norm = mixing_distance(q.detach(), k.detach(), **own, **where, return_norm=True)
            metrics[f"layer_{view.layer}"] = (distance / norm).mean()
        return cast(Tensor, sum(metrics.values())) / len(views), metrics


class EndToEnd(nn.Module):
    """What objectives of a student as a whole share."""

    student: HybridForCausalLM

    def models(self) -> list[PreTrainedModel]:
        raise NotImplementedError

    def compilable(self) -> list[tuple[object, str]]:
        return compilable_layers(*self.models())

    def kind(self) -> tuple:
        return trans_point_pattern(self.student)


class Distillation(EndToEnd):
    """End to end: a divergence of the student's next-token distributions from the teacher's, mean per token, and what
    the settings add to it.

        divergence (see `kernels.kl.linear_kl`)
        + ce_weight * cross-entropy on the next token of the text, where there is one in the document, per token of text
        + hidden_weight * mean over layers and sequences of ||student's hidden states - teacher's||^2 / ||teacher's||^2

    All are sums over the tokens of a batch divided by their number, so that gradients of micro-batches add up to that
    of the batch. Figures: `kl` (the divergence, whichever it is), `ce`, `hidden`, where they are asked for, and of a
    TransMamba student `attention`, the fraction of tokens and layers that took it.
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM, settings: DistillConfig):
        super().__init__()
        self.student = student
        self.beside: tuple[Any, ...] = (teacher,)
        self.settings = settings

    def models(self) -> list[PreTrainedModel]:
        return [*self.beside, self.student]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,), settings = self.beside, self.settings
        inputs = decoder_inputs(batch, *self.models())
        with torch.no_grad():
            target = hidden_states(teacher, inputs, every=settings.hidden_weight > 0)
        found = hidden_states(self.student, inputs, every=settings.hidden_weight > 0)
        head, operands = output_head(self.student, check=False), output_head(teacher, check=False).operands(target[-1])
        divergence = partial(linear_kl, *head.operands(found[-1]), *operands, softcap=head.softcap)
        loss, metrics = predictions_loss(divergence, settings, batch)
        if settings.hidden_weight > 0:
            pairs = zip(found, target, strict=True)
            metrics["hidden"] = torch.stack([relative_error(own, wanted) for own, wanted in pairs]).mean()
            loss = loss + settings.hidden_weight * metrics["hidden"]
        return loss, metrics | attention_share(self.student, batch)


class CachedDistillation(EndToEnd):
    """What `Distillation` is, from what `data.teacher_cache.CachedTargets` adds to a batch in place of the teacher.

    With the teacher's k most likely tokens its divergence is `cached_kl`, a lower bound. With its last hidden states,
    where they are cached, and its own `head`, it is `linear_kl`, the divergence itself. Hidden states of all layers are
    not cached: `hidden_weight` is left out (and refused by `CachedTargets.check`).

    Args:
        vocab_size: of the teacher; rows of the student's output matrix past it are left out.
    """

    def __init__(
        self, student: HybridForCausalLM, settings: DistillConfig, vocab_size: int, head: OutputHead | None = None
    ):
        super().__init__()
        self.student = student
        self.settings = settings
        self.vocab_size = vocab_size
        self.beside: tuple[Any, ...] = (head,)

    def models(self) -> list[PreTrainedModel]:
        return [self.student]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (head,), settings = self.beside, self.settings
        hidden = self.student.get_decoder()(**decoder_inputs(batch, self.student)).last_hidden_state
        own = output_head(self.student, check=False)
        hidden, weight = own.operands(hidden)
        if head is not None:
            divergence = partial(linear_kl, hidden, weight, *head.operands(batch["teacher_hidden"]))
        else:
            targets = (batch[f"teacher_{name}"] for name in ("ids", "logprobs", "rest"))
            divergence = partial(cached_kl, hidden, weight[: self.vocab_size], *targets)
        divergence = partial(divergence, softcap=own.softcap)
        loss, metrics = predictions_loss(divergence, settings, batch)
        return loss, metrics | attention_share(self.student, batch)


class AnswerTuning(EndToEnd):
    """End to end, on answers alone: a divergence of the student's next-token distributions from the teacher's, or
    cross-entropy, in nats per token of an answer.

    A sum over the tokens of answers in a batch, divided by how many the whole step has (which the batch says): so
    gradients of micro-batches add up to that of the step. Figure: the loss, as `kl` (the divergence, whichever it is)
    or `ce`.

    Args:
        teacher: None for cross-entropy.
    """

    def __init__(self, teacher: PreTrainedModel | None, student: HybridForCausalLM, settings: "TuneConfig"):
        super().__init__()
        self.student = student
        self.beside: tuple[Any, ...] = (teacher,)
        self.settings = settings

    def models(self) -> list[PreTrainedModel]:
        return [model for model in (*self.beside, self.student) if model is not None]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,), settings = self.beside, self.settings
        inputs, counts = decoder_inputs(batch, *self.models()), batch["before_answer"]
        head = output_head(self.student, check=False)
        own = head.operands(hidden_states(self.student, inputs, every=False)[-1])
        options: dict[str, Any]
        if teacher is None:
            # From itself it has no divergence, and none in the gradient: cross-entropy is what is left.
            name, target, options = "ce", tuple(operand.detach() for operand in own), {"labels": next_tokens(batch)}
        else:
            with torch.no_grad():
                hidden = hidden_states(teacher, inputs, every=False)[-1]
                name, target = "kl", output_head(teacher, check=False).operands(hidden)
            options = {key: getattr(settings, key) for key in ("divergence", "beta", "temperature")}
        mean = linear_kl(*own, *target, mask=counts, softcap=head.softcap, **options)
        loss = mean * (counts.sum(1) * batch["per_answer"]).mean()
        return loss, {name: loss.detach()} | attention_share(self.student, batch)


class LanguageModeling(EndToEnd):
    """End to end, from the text alone: cross-entropy on the next token, where there is one in the document, in nats per
    token of text."""

    beside: tuple[Any, ...] = ()

    def __init__(self, student: HybridForCausalLM):
        super().__init__()
        self.student = student

    def models(self) -> list[PreTrainedModel]:
        return [self.student]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs, head = decoder_inputs(batch, self.student), output_head(self.student, check=False)
        own = head.operands(hidden_states(self.student, inputs, every=False)[-1])
        # From itself it has no divergence, and none in the gradient.
        target = (operand.detach() for operand in own)
        loss = linear_kl(*own, *target, labels=next_tokens(batch), ce_over="tokens", softcap=head.softcap)
        return loss, attention_share(self.student, batch)


def hidden_states(model: PreTrainedModel, inputs: dict, every: bool) -> list[Tensor]:
    """What the layers of a decoder give, (B, L, hidden) each, the last one after the last norm; unless `every`, that
    alone.

    transformers' own `output_hidden_states` changes the layers' forward functions, which cannot be compiled then.
    """
    found: list[Tensor] = []

    def take(layer, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    decoder = model.get_decoder()
    handles = [layer.register_forward_hook(take) for layer in decoder.layers[:-1]] if every else []
    try:
        last = decoder(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [*found, last]


def decoder_inputs(batch: dict[str, Tensor], *models: PreTrainedModel) -> dict:
    """What to call the decoders of these models with, on a batch of packed documents."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    if any(model.config._attn_implementation != FLEX for model in models):
        return inputs
    head_dim = getattr(models[0].config, "head_dim", None) or sys.maxsize  # unknown: large
    inputs["kernel_options"] = flex_options(head_dim, batch["input_ids"].device)
    # One mask for all, unless some layers have another one.
    windowed = ("sliding_window", "attention_chunk_size")
    if not any(getattr(model.config, name, None) for model in models for name in windowed):
        inputs["attention_mask"] = document_mask(document_index(batch["position_ids"]))
    return inputs


def compilable_layers(*models: PreTrainedModel) -> list[tuple[object, str]]:
    """All layers of the models; of those that are computed again in the backward pass, their parts."""
    found = []
    for model in models:
        for layer in model.get_decoder().layers:
            again = model.training and getattr(layer, "gradient_checkpointing", False)
            found += [(part, "forward") for part in (layer.children() if again else [layer])]
    return found


def trans_point_pattern(student: HybridForCausalLM) -> tuple:
    """What the work of a pass depends on in TransPoints, which are numbers on the device: which layers have the same,
    and which have but one form."""
    points = student.trans_points
    return tuple((points.index(point), point if point in (0, math.inf) else None) for point in points)


def predictions_loss(
    divergence: Callable, settings: DistillConfig, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A divergence with the settings' options and cross-entropy, and its metrics; `divergence` takes what `linear_kl`
    takes by keyword."""
    labels = next_tokens(batch) if settings.ce_weight > 0 else None
    loss, kl, ce = divergence(
        divergence=settings.divergence,
        beta=settings.beta,
        temperature=settings.temperature,
        labels=labels,
        ce_weight=settings.ce_weight,
        ce_over="tokens",
        return_parts=True,
    )
    return loss, {"kl": kl} | ({"ce": ce} if labels is not None else {})


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Labels (B, L): the next token of the same document, or -100."""
    ids, positions = batch["input_ids"], batch["position_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
    return labels


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2 of each sequence of (B, L, hidden), mean over them."""
    # Per sequence, so that the loss does not depend on how a step is cut into micro-batches and processes.
    error, size = (t.float().pow(2).sum((1, 2)) for t in (found - wanted, wanted))
    return (error / size).mean()


def attention_share(student: HybridForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The figure `attention` of a TransMamba student: the fraction of tokens and layers that took it."""
    if not have_trans_points(student.config.mixers):
        return {}
    points, mixers, device = student.trans_points, student.mixer_layers(), batch["position_ids"].device
    shares = []
    for point in sorted(set(points)):
        # On the device it is a number that may change under a recorded pass; here it would be what it was then.
        held = getattr(mixers[points.index(point)], "point", None)
        current = held if held is not None and held.device == device and 0 < point < math.inf else point
        shares.append(points.count(point) * (batch["position_ids"] < current).float().mean())
    return {"attention": cast(Tensor, sum(shares)) / len(points)}


@torch.no_grad()
def attention_pairs(teacher: PreTrainedModel, views: list, batch: dict[str, Tensor]) -> dict[int, tuple]:
    """Runs the teacher and takes down, for each view's layer: attention's input, its output, position embeddings.

    In float32, as mixers are, whatever the teacher is in; under autocast as they are, since products round them alike.
    """
    pairs = {}
    autocast = torch.is_autocast_enabled(batch["input_ids"].device.type)

    def take(layer: int):
        def hook(module, args, kwargs, output):
            cos_sin = kwargs.get("position_embeddings")
            cos_sin = tuple(table.float() for table in cos_sin) if cos_sin is not None else None
            taken = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]
            pairs[layer] = (*(taken if autocast else (t.float() for t in taken)), cos_sin)

        return hook

    handles = [view.module.register_forward_hook(take(view.layer), with_kwargs=True) for view in views]
    try:
        teacher.get_decoder()(**decoder_inputs(batch, teacher))
    finally:
        for handle in handles:
            handle.remove()
    return pairs
