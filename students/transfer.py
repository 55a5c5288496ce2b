"""Weight transfer as data: which teacher tensor, through which operation, becomes which student tensor.

A `TransferPlan` is made from the teacher's attention views and the student's mixers, can be printed as a table, and is
then executed. Everything it does not name is the teacher's own, copied as it is.

The algebra (attention is linear attention with a softmax, Mamba-2 is linear attention with decay; arXiv 2405.21060,
section 7, and arXiv 2408.15237): C = scale * Q, B = K, x = V, out_proj = O. The convolution starts as identity, its
bias takes the projections' biases; the gate starts open, the skip D at 0. A TransMamba mixer keeps the teacher's
projections as they are, under their names, and only what it has besides starts in this way.
"""

import math
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor, nn

from ..teachers import AttentionView, attention_view
from .errors import StudentError
from .mamba2 import GATE_OPEN, STEP_ONE, Mamba2Mixer
from .modeling_transmamba import TransMambaMixer

# SiLU(e u) is e u / 2 + (e u)^2 / 4 + ...: a small input keeps it nearly linear, as attention's values and keys are.
# (Queries are small already, by 1/sqrt(P).) The norm, or calibration, takes the factor out again.
SILU_INPUT = {"x": 0.25, "B": 0.25, "C": 1.0}
# Half-life, in tokens, that a head starts with before `calibrate` has measured the teacher's.
HALF_LIFE = 32.0


@dataclass(frozen=True)
class Transfer:
    """One student tensor (or some of its rows) and where it comes from."""

    target: str  # parameter's name in the student: "model.layers.1.self_attn.in_proj.weight"
    operation: str  # "copy", "scale", "constant", "identity"
    source: str | None = None  # parameter's name in the teacher
    rows: tuple[int, int] | None = None  # of the target; None: all
    part: str = ""  # what those rows are: "C"
    value: float | tuple[float, ...] | None = None  # factor of scale, or the constant

    def compute(self, teacher: dict[str, Tensor], like: Tensor) -> Tensor:
        """The new content of the target (or its rows), shaped as `like`."""
        if self.operation == "constant":
            return torch.as_tensor(self.value, dtype=like.dtype).expand_as(like)
        if self.operation == "identity":  # of a depthwise convolution (channels, 1, taps): the current token alone
            taps = torch.zeros_like(like, device="cpu")
            taps[..., -1] = self.value
            return taps
        tensor = teacher.get(self.source)
        if tensor is None:
            raise StudentError(f"{self.target} needs {self.source}, which the teacher does not have")
        if tensor.shape != like.shape:
            raise StudentError(f"{self.source} is {tuple(tensor.shape)}, {self.target} needs {tuple(like.shape)}")
        return tensor * self.value if self.operation == "scale" else tensor

    def describe(self) -> str:
        if self.operation in ("copy", "scale"):
            return self.source + (f" * {self.value:.4g}" if self.operation == "scale" else "")
        if self.operation == "identity":
            return f"the current token * {self.value:.4g}"
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return " ".join(f"{value:.4g}" for value in (values if len(set(values)) > 1 else values[:1]))


@dataclass
class TransferPlan:
    """The transfers of a whole student, in order."""

    transfers: list[Transfer] = field(default_factory=list)
    kept: int = 0  # how many further tensors are the teacher's own

    @torch.no_grad()
    def execute(self, teacher: nn.Module, student: nn.Module) -> None:
        """Fills the student's parameters: the planned ones as planned, all others with the teacher's.

        Raises:
            StudentError: a tensor is missing or has another shape than planned.
        """
        source = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
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
            target = targets[transfer.target]
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


def transfer_plan(teacher: nn.Module, student: nn.Module) -> TransferPlan:
    """The plan that turns this teacher into this student (of `hybrid_model_class`, weights not read).

    Raises StudentError where something of the teacher would be in no tensor of the student.
    """
    plan, dropped = TransferPlan(), []
    modules = dict(student.named_modules())
    for view in attention_view(teacher):
        mixer = modules[view.name]
        if getattr(mixer, "q_norm", None) is None:  # by choice, see `student.qk_norm`
            dropped += [f"{view.name}.q_norm.", f"{view.name}.k_norm."]
        if isinstance(mixer, Mamba2Mixer):
            plan.transfers += _mamba2_transfers(view, mixer)
        elif isinstance(mixer, TransMambaMixer):
            plan.transfers += _transmamba_transfers(view, mixer)
    planned = {transfer.target for transfer in plan.transfers}
    plan.kept = sum(name not in planned for name, _ in student.named_parameters())
    used = student.state_dict().keys() | {transfer.source for transfer in plan.transfers}
    if lost := [name for name in teacher.state_dict() if name not in used and not name.startswith(tuple(dropped))]:
        raise StudentError(
            f"the student has no place for the teacher's {', '.join(lost[:3])}: it would be another model"
        )
    return plan


def _mamba2_transfers(view: AttentionView, mixer: Mamba2Mixer) -> list[Transfer]:
    def named(module: str, name: str) -> str:
        return f"{view.name}.{module}.{name}"

    # A query is scaled before it meets a key; where it is normed first, the mixer scales after its norm.
    sources = {"x": ("v_proj", 1.0), "B": ("k_proj", 1.0), "C": ("q_proj", view.scale if mixer.q_norm is None else 1.0)}
    weight, conv = f"{view.name}.in_proj.weight", f"{view.name}.conv1d"
    transfers: list[Transfer] = []
    row = channel = 0
    for part, size in mixer.sizes.items():
        rows, row = (row, row + size), row + size
        if part not in sources:
            if size:
                transfers.append(Transfer(weight, "constant", rows=rows, part=part, value=0.0))
            continue
        projection, factor = sources[part]
        channels, channel = (channel, channel + size), channel + size
        tap = SILU_INPUT[part] if mixer.conv_activation == "silu" else 1.0
        transfers += [
            _scaled(weight, named(projection, "weight"), rows, part, factor),
            Transfer(f"{conv}.weight", "identity", rows=channels, part=part, value=tap),
            Transfer(f"{conv}.bias", "constant", rows=channels, part=part, value=0.0)
            if getattr(view, projection).bias is None
            else _scaled(f"{conv}.bias", named(projection, "bias"), channels, part, factor * tap),
        ]
    if mixer.gate:
        transfers.append(Transfer(f"{view.name}.z_bias", "constant", value=GATE_OPEN))
    transfers += _recurrence_transfers(view, mixer)
    transfers.append(Transfer(f"{view.name}.out_proj.weight", "copy", named("o_proj", "weight")))
    if view.o_proj.bias is not None:
        transfers.append(Transfer(f"{view.name}.out_proj.bias", "copy", named("o_proj", "bias")))
    return transfers


def _transmamba_transfers(view: AttentionView, mixer: TransMambaMixer) -> list[Transfer]:
    if mixer.window != view.window:
        raise StudentError(f"{view.name} has a window of {view.window} tokens, its mixer one of {mixer.window}")
    transfers = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for part in ("weight",) if getattr(view, name).bias is None else ("weight", "bias"):
            transfers.append(Transfer(f"{view.name}.{name}.{part}", "copy", f"{view.name}.{name}.{part}"))
    if mixer.conv1d is not None:
        channel, silu = 0, mixer.conv_activation == "silu"
        for part, heads in (("x", mixer.num_kv_heads), ("B", mixer.num_kv_heads), ("C", mixer.num_heads)):
            channels, channel = (channel, channel + heads * mixer.head_dim), channel + heads * mixer.head_dim
            tap = SILU_INPUT[part] if silu else 1.0
            transfers.append(Transfer(f"{view.name}.conv1d.weight", "identity", rows=channels, part=part, value=tap))
        transfers.append(Transfer(f"{view.name}.conv1d.bias", "constant", value=0.0))
    if mixer.gate:
        transfers.append(Transfer(f"{view.name}.z_proj.weight", "constant", value=0.0))
        transfers.append(Transfer(f"{view.name}.z_proj.bias", "constant", value=GATE_OPEN))
    transfers.append(Transfer(f"{view.name}.dt_proj.weight", "constant", value=0.0))
    return transfers + _recurrence_transfers(view, mixer)


def _recurrence_transfers(view: AttentionView, mixer: Mamba2Mixer | TransMambaMixer) -> list[Transfer]:
    """What no attention has: step, decay, skip, and the norm of what the recurrence reads."""
    decay = 0.5 ** (1 / HALF_LIFE)  # of the state in one token
    transfers = [
        Transfer(f"{view.name}.dt_bias", "constant", value=STEP_ONE),
        Transfer(f"{view.name}.A_log", "constant", value=math.log(-math.log(decay))),
        Transfer(f"{view.name}.D", "constant", value=0.0),
    ]
    if mixer.norm is not None:
        transfers.append(Transfer(f"{view.name}.norm.weight", "constant", value=1.0))
    return transfers


def _scaled(target: str, source: str, rows: tuple[int, int], part: str, factor: float) -> Transfer:
    if factor == 1:
        return Transfer(target, "copy", source, rows, part)
    return Transfer(target, "scale", source, rows, part, factor)
