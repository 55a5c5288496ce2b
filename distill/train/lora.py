"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a student's projections, by peft."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...students import HybridForCausalLM
from ..errors import RunError
from ..settings import LoraSettings


def attach(student: HybridForCausalLM, settings: LoraSettings, stage: str) -> None:
    """Puts adapters on the projections that a stage's `settings.targets` name, as whole parts of their names.

    With a rank of 0 there are none.

    Raises:
        RunError: a target that the student has not, or the output matrix, which is not called as a module.
    """
    if not settings.rank:
        return
    head = student.get_output_embeddings()
    linear = [name for name, module in student.named_modules() if isinstance(module, nn.Linear) and module is not head]
    projections = {name.split(".")[-1] for name in linear}
    unknown = [target for target in settings.targets if target not in projections]
    if unknown:
        raise RunError(
            f"{stage}.lora.targets names {', '.join(unknown)}; this student's projections are "
            f"{', '.join(sorted(projections))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # it need not be whole
        lora_dropout=settings.dropout,
        target_modules=[name for name in linear if name.split(".")[-1] in settings.targets],
    )
    inject_adapter_in_model(config, student)


def merge(student: HybridForCausalLM) -> None:
    """Adds what adapters learned to the matrices they adapt, and takes them off."""
    adapted = {name: module for name, module in student.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in adapted.items():
        module.merge(safe_merge=True)
        student.set_submodule(name, module.get_base_layer())
