"""Which parameters of a student a stage trains, in groups with their own learning rate and weight decay."""

from typing import NotRequired, TypedDict

from torch import nn

from ...students import HybridForCausalLM, Mixer
from ..settings import EndToEndConfig, GroupsConfig
from .protocols import Objective

GROUPS = tuple(GroupsConfig.__dataclass_fields__)


class ParameterGroup(TypedDict):
    """Parameters that are trained with one learning rate. Without a weight decay it is the stage's."""

    name: str
    parameters: dict[str, nn.Parameter]  # by name
    lr: float
    weight_decay: NotRequired[float]


def distill_groups(student: HybridForCausalLM, settings: EndToEndConfig) -> list[ParameterGroup]:
    """The groups that a stage trains end to end.

    A group without a learning rate of its own takes that of the mixers (`lr`) or of what was the teacher's
    (`others_lr`). Those at 0 are left out: they stay as they are. Adapters (see `lora`) are a group, and the matrices
    they adapt stay as they are.
    """
    members: dict[str, dict[str, nn.Parameter]] = {name: {} for name in (*GROUPS, "lora")}
    for name, parameter in student.named_parameters():
        if ".lora_" in name:
            members["lora"][name] = parameter
        elif ".base_layer." not in name:
            members[group_of(name, student)][name] = parameter
    found: list[ParameterGroup] = []
    for name, parameters in members.items():
        own = settings.lora if name == "lora" else getattr(settings.groups, name)
        lr = own.lr if own.lr is not None else settings.lr if name == "mixers" else settings.others_lr
        decay = settings.weight_decay if own.weight_decay is None else own.weight_decay
        if parameters and lr > 0:
            found.append({"name": name, "parameters": parameters, "lr": lr, "weight_decay": decay})
    return found


def only_these_train(module: nn.Module | Objective, groups: list[ParameterGroup]) -> None:
    """Sets `requires_grad` of a module's parameters: whether they are in these groups."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for group in groups:
        for parameter in group["parameters"].values():
            parameter.requires_grad_(True)


def mixer_parameters(
    student: HybridForCausalLM, layers: set[int] | None = None, only: str | None = None
) -> dict[str, nn.Parameter]:
    """The parameters of the layers that replaced attention, by name.

    Args:
        layers: of these; None: of all.
        only: what their matrices between tokens depend on ("matrix"), or what came from the teacher ("copied"): those
            whose names begin as this attribute of their mixer says.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        names[id(parameter)]: parameter
        for layer, mixer in enumerate(student.mixer_layers())
        if mixer is not None and (layers is None or layer in layers)
        for name, parameter in mixer.named_parameters()
        if only is None or name.startswith(getattr(mixer, only))
    }


def trained_mixers(student: HybridForCausalLM) -> dict[int, Mixer]:
    """The mixers that train, by layer."""
    mixers = {layer: mixer for layer, mixer in enumerate(student.mixer_layers()) if mixer is not None}
    return {layer: mixer for layer, mixer in mixers.items() if any(p.requires_grad for p in mixer.parameters())}


def group_of(name: str, student: HybridForCausalLM) -> str:
    """The group of a student's parameter. A head that is tied to the embeddings is theirs."""
    parts = name.split(".")
    if (attention := student.config.attention_name) in parts:
        layer = int(parts[parts.index(attention) - 1])
        return "attention" if student.config.mixers[layer] == "attention" else "mixers"
    if "mlp" in parts:
        return "mlp"
    if student.get_submodule(".".join(parts[:-1])) is student.get_output_embeddings():
        return "head"
    if any(part.startswith(("embed", "wte")) for part in parts):
        return "embeddings"
    return "norms" if "norm" in parts[-2] else "other"
