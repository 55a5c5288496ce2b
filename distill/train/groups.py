"""Which parameters of a student a stage trains, in groups with their own learning rate and weight decay."""

from typing import NotRequired, TypedDict

from torch import nn

from ...students import HybridForCausalLM
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


def mixer_parameters(student: HybridForCausalLM) -> dict[str, nn.Parameter]:
    """The parameters of the layers that replaced attention, by name."""
    return {name: p for name, p in student.named_parameters() if group_of(name, student) == "mixers"}


def matrix_parameters(student: HybridForCausalLM) -> dict[str, nn.Parameter]:
    """The parameters that the matrices of the mixers between tokens depend on, by name."""
    return _of_mixers(student, "matrix")


def copied_parameters(student: HybridForCausalLM) -> dict[str, nn.Parameter]:
    """The parameters of the mixers that came from the teacher, by name."""
    return _of_mixers(student, "copied")


def _of_mixers(student: HybridForCausalLM, kind: str) -> dict[str, nn.Parameter]:
    """Those whose names begin as an attribute of their mixer says."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {
        names[id(parameter)]: parameter
        for mixer in student.mixer_layers()
        if mixer is not None
        for name, parameter in mixer.named_parameters()
        if name.startswith(getattr(mixer, kind))
    }


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
