"""What the training stages minimise: modules whose `forward(batch)` gives a loss and named figures.

The teacher is held beside the module, not in it: it is never wrapped, moved, optimised or saved with it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.kl import linear_kl
from ..students import HybridForCausalLM
from ..students.cache import document_index
from ..students.modeling_transmamba import Documents
from ..teachers import attention_view
from .config import DistillConfig


class Alignment(nn.Module):
    """Each mixer alone, all layers at once: the teacher's attention output from the teacher's own input.

    The loss is the mean over layers and sequences of ||mixer(h) - attention(h)||^2 / ||attention(h)||^2: relative L2,
    as in MOHAWK's second stage (arXiv 2408.10189), which takes whole blocks. Figures: one `layer_N` for each mixer.

    A TransMamba mixer has two forms of one set of weights: to the loss of the state-space form (T = 0) it adds that of
    the attention form (T = infinity), so that this stays the teacher's while the weights learn to serve both; further
    figures `attention_N`. Training only what the state-space form has for itself is left far behind
    (docs/transmamba.md).
    """

    def __init__(self, teacher: PreTrainedModel, student: HybridForCausalLM):
        super().__init__()
        layers = {layer: mixer for layer, mixer in enumerate(student.mixer_layers()) if mixer is not None}
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in layers.items()})
        self.beside = (teacher, [view for view in attention_view(teacher) if view.layer in layers])

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, views = self.beside
        pairs = attention_pairs(teacher, views, batch)
        seq_idx = document_index(batch["position_ids"])
        documents = Documents(seq_idx)  # once for all mixers, as it waits for the device
        figures = {}
        for view in views:
            inputs, output, position_embeddings = pairs[view.layer]
            mixer = self.mixers[str(view.layer)]
            for name, trans_point in _forms(mixer):
                with _at(mixer, trans_point):
                    found = mixer(inputs, position_embeddings, seq_idx=seq_idx, documents=documents)[0]
                figures[f"{name}_{view.layer}"] = relative_error(found, output)
        return sum(figures.values()) / len(views), figures


def _forms(mixer: nn.Module) -> tuple[tuple[str, int | float | None], ...]:
    """For each form of a mixer its name in the figures, and the TransPoint that gives it."""
    return (("layer", 0), ("attention", math.inf)) if hasattr(mixer, "trans_point") else (("layer", None),)


@contextmanager
def _at(mixer: nn.Module, trans_point: int | float | None) -> Iterator[None]:
    if trans_point is None:
        yield
        return
    own, mixer.trans_point = mixer.trans_point, trans_point
    try:
        yield
    finally:
        mixer.trans_point = own


class Distillation(nn.Module):
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
        self.beside = (teacher,)
        self.settings = settings

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,), settings = self.beside, self.settings
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        inputs["output_hidden_states"] = settings.hidden_weight > 0
        with torch.no_grad():
            target = teacher.get_decoder()(**inputs)
        found = self.student.get_decoder()(**inputs)
        divergence = partial(
            linear_kl,
            found.last_hidden_state,
            self.student.get_output_embeddings().weight,
            target.last_hidden_state,
            teacher.get_output_embeddings().weight,
        )
        loss, figures = predictions_loss(divergence, settings, batch)
        if settings.hidden_weight > 0:
            pairs = zip(found.hidden_states[1:], target.hidden_states[1:], strict=True)
            figures["hidden"] = torch.stack([relative_error(own, wanted) for own, wanted in pairs]).mean()
            loss = loss + settings.hidden_weight * figures["hidden"]
        return loss, figures | attention_share(self.student, batch)


def predictions_loss(
    divergence: Callable, settings: DistillConfig, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A divergence with the settings' options and cross-entropy, and its figures; `divergence` takes what `linear_kl`
    takes by keyword."""
    labels, labelled = next_tokens(batch) if settings.ce_weight > 0 else (None, 0.0)
    loss, kl, ce = divergence(
        divergence=settings.divergence,
        beta=settings.beta,
        temperature=settings.temperature,
        labels=labels,
        ce_weight=settings.ce_weight * labelled,
        return_parts=True,
    )
    return loss, {"kl": kl} | ({"ce": ce * labelled} if labels is not None else {})


def next_tokens(batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Labels (B, L): the next token of the same document, or -100; and the fraction of tokens that have one.

    The fraction is read off `batch["labelled"]` if it is there (see `loader`), as the device would have to be waited
    for.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:].masked_fill(positions[:, 1:] == 0, -100)
    labelled = batch.get("labelled")
    return labels, (labels >= 0).float().mean().item() if labelled is None else labelled


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """||found - wanted||^2 / ||wanted||^2 of each sequence of (B, L, hidden), mean over them."""
    # Per sequence, so that the loss does not depend on how a step is cut into micro-batches and processes.
    error, size = (t.float().pow(2).sum((1, 2)) for t in (found - wanted, wanted))
    return (error / size).mean()


def attention_share(student: HybridForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The figure `attention` of a TransMamba student: the fraction of tokens and layers that took it."""
    if "transmamba" not in student.config.mixers:
        return {}
    points = torch.tensor(student.trans_points, device=batch["position_ids"].device)
    return {"attention": (batch["position_ids"][..., None] < points).float().mean()}


@torch.no_grad()
def attention_pairs(teacher: PreTrainedModel, views: list, batch: dict[str, Tensor]) -> dict[int, tuple]:
    """Runs the teacher and takes down, for each view's layer: attention's input, its output, position embeddings.

    In float32, as mixers are, whatever the teacher is in.
    """
    pairs = {}

    def take(layer: int):
        def hook(module, args, kwargs, output):
            cos_sin = kwargs.get("position_embeddings")
            cos_sin = tuple(table.float() for table in cos_sin) if cos_sin is not None else None
            pairs[layer] = (kwargs["hidden_states"].float(), output[0].float(), cos_sin)

        return hook

    handles = [view.module.register_forward_hook(take(view.layer), with_kwargs=True) for view in views]
    try:
        teacher.get_decoder()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return pairs
