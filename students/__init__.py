"""Students: mixers, hybrid assembly, layer and transfer plans, and the modeling files that travel with a checkpoint.

What is here is loaded when it is first asked for, so that what needs no torch does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import build_student, plan_student
    from .config import StudentConfig, layer_plan
    from .modeling.cache import HybridCache
    from .modeling.configuration_hybrid import MODEL_TYPE, HybridConfig
    from .modeling.configuration_mixers import MIXERS, MixerKind, Option
    from .modeling.configuration_transmamba import SCHEDULES, parse_trans_points
    from .modeling.errors import StudentError
    from .modeling.mamba2 import Mamba2Mixer
    from .modeling.modeling_hybrid import HybridForCausalLM
    from .modeling.modeling_mixer import Geometry, Mixer, Transfer
    from .modeling.modeling_transmamba import TransMambaMixer, memory_converter
    from .transfer import TransferPlan, transfer_plan

_WHERE = {
    "Geometry": "modeling_mixer",
    "HybridCache": "cache",
    "HybridConfig": "configuration_hybrid",
    "HybridForCausalLM": "modeling_hybrid",
    "MIXERS": "configuration_mixers",
    "MODEL_TYPE": "configuration_hybrid",
    "Mamba2Mixer": "mamba2",
    "Mixer": "modeling_mixer",
    "MixerKind": "configuration_mixers",
    "Option": "configuration_mixers",
    "SCHEDULES": "configuration_transmamba",
    "StudentConfig": "config",
    "StudentError": "errors",
    "TransMambaMixer": "modeling_transmamba",
    "Transfer": "modeling_mixer",
    "TransferPlan": "transfer",
    "build_student": "build",
    "layer_plan": "config",
    "memory_converter": "modeling_transmamba",
    "parse_trans_points": "configuration_transmamba",
    "plan_student": "build",
    "transfer_plan": "transfer",
}

__all__ = [
    "Geometry",
    "HybridCache",
    "HybridConfig",
    "HybridForCausalLM",
    "MIXERS",
    "MODEL_TYPE",
    "Mamba2Mixer",
    "Mixer",
    "MixerKind",
    "Option",
    "SCHEDULES",
    "StudentConfig",
    "StudentError",
    "TransMambaMixer",
    "Transfer",
    "TransferPlan",
    "build_student",
    "layer_plan",
    "memory_converter",
    "parse_trans_points",
    "plan_student",
    "transfer_plan",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
