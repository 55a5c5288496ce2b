"""Weight transfer as data: which teacher tensor, through which operation, becomes which student tensor.

A `TransferPlan` is put together from what each mixer says of each attention view (`Mixer.transfers`), can be printed as
a table, and is then executed. Everything it does not name is the teacher's own, copied as it is.

The algebra (attention is linear attention with a softmax, Mamba-2 is linear attention with decay; arXiv 2405.21060,
section 7, and arXiv 2408.15237): C = scale * Q, B = K, x = V, out_proj = O. The convolution starts as identity, its
bias takes the projections' biases; the gate starts open, the skip D at 0. A TransMamba mixer keeps the teacher's
projections as they are, under their names, and only what it has besides starts in this way.
"""

from dataclasses import dataclass, field, replace

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..teachers import attention_view
from .modeling.configuration_hybrid import HybridConfig
from .modeling.errors import StudentError
from .modeling.modeling_hybrid import HybridForCausalLM
from .modeling.modeling_mixer import Transfer


@dataclass
class TransferPlan:
    """The transfers of a whole student, in order."""

    transfers: list[Transfer] = field(default_factory=list)
    kept: int = 0  # how many further tensors are the teacher's own, or those of the student that this one goes on from

    @torch.no_grad()
    def execute(self, teacher: nn.Module, student: nn.Module, start: nn.Module | None = None) -> None:
        """Fills the student's parameters: the planned ones as planned, all others with the teacher's.

        Args:
            start: another student of this teacher; what it has comes from it, what it lacks from the teacher.

        Raises:
            StudentError: a tensor is missing or has another shape than planned.
        """
        source = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
        source |= dict(start.named_parameters()) if start is not None else {}
        planned = {transfer.target for transfer in self.transfers}
        targets = dict(student.named_parameters())
        for name, parameter in targets.items():
            if name in planned:
                continue
            if name not in source or source[name].shape != parameter.shape:
                raise StudentError(f"the student's {name} has no counterpart in the teacher and is not planned")
            parameter.copy_(source[name])
        for transfer in self.transfers:
            if transfer.target not in targets:
                raise StudentError(f"the plan fills {transfer.target}, which the student does not have")
            target: Tensor = targets[transfer.target]
            target = target[slice(*transfer.rows)] if transfer.rows else target
            target.copy_(transfer.compute(source, target))

    def table(self) -> Table:
        table = Table("student tensor", "rows", "is", "teacher tensor", title="transfer plan")
        for t in self.transfers:
            rows = f"{t.rows[0]}:{t.rows[1]}" if t.rows else "all"
            table.add_row(t.target, f"{rows} {t.part}".strip(), t.operation, t.describe())
        table.add_row(f"{self.kept} further tensors", "all", "copy", "the same name")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def transfer_plan(
    teacher: PreTrainedModel, student: HybridForCausalLM, start: HybridConfig | None = None
) -> TransferPlan:
    """The plan that turns this teacher into this student (of `hybrid_model_class`, weights not read).

    Args:
        start: of the student that it goes on from: what are mixers there are the same here.

    Raises StudentError where something of the teacher would be in no tensor of the student.
    """
    plan, dropped = TransferPlan(), []
    before = ["attention"] * len(student.config.mixers) if start is None else start.mixers
    mixers = {layer: mixer for layer, mixer in enumerate(student.mixer_layers()) if mixer is not None}
    new = {layer for layer in mixers if before[layer] == "attention"}
    names = {module: name for name, module in student.named_modules()}
    dropped += [f"{names[mixer]}." for layer, mixer in mixers.items() if layer not in new]
    for view in attention_view(teacher, check=False, layers=new):
        plan.transfers += mixers[view.layer].transfers(view)
        dropped += [f"{view.name}.{name}" for name in mixers[view.layer].drops(view)]
    plan.transfers = _with_common(plan.transfers, student, before)
    planned = {transfer.target for transfer in plan.transfers}
    plan.kept = sum(name not in planned for name, _ in student.named_parameters())
    used = student.state_dict().keys() | {one.source for t in plan.transfers for one in (t, *t.among)}
    if lost := [name for name in teacher.state_dict() if name not in used and not name.startswith(tuple(dropped))]:
        raise StudentError(
            f"the student has no place for the teacher's {', '.join(lost[:3])}: it would be another model"
        )
    return plan


def _with_common(transfers: list[Transfer], student: HybridForCausalLM, before: list[str]) -> list[Transfer]:
    """Of parameters that mixers have in common one transfer, the mean over their layers: of all matrices it has the
    smallest sum of squared differences from theirs, and treats them alike.

    Raises StudentError where some of the layers have them from the student that this one goes on from, and others not.
    """
    tied = student.tied_mixers
    members: dict[str, list[Transfer]] = {}
    for transfer in transfers:
        if transfer.operation == "mean":
            members.setdefault(tied.get(transfer.target, transfer.target), []).append(transfer)
    found = []
    for transfer in transfers:
        if transfer.operation not in ("mean", "low rank"):
            found.append(transfer)
            continue
        whole = transfer.target.removesuffix(f"{transfer.part}.weight") + "weight" if transfer.part else transfer.target
        owner = tied.get(whole, whole)
        if len(members[owner]) <= list(tied.values()).count(owner):
            layers = [layer for layer, was in enumerate(before) if was != "attention"]
            raise StudentError(
                f"layers {layers} of the student to start from share projections with further ones now: convert "
                "all of them at once, or leave student.attention_shared_rank out"
            )
        if transfer.operation == "low rank" or owner == transfer.target:
            found.append(replace(transfer, among=tuple(members[owner])))
    return found
