"""Students: mixers, hybrid assembly, layer and transfer plans, and the modeling files that travel with a checkpoint."""

from transformers import AutoConfig

from .build import build_student, plan_student
from .cache import HybridCache
from .config import StudentConfig, layer_plan
from .configuration_hybrid import MODEL_TYPE, HybridConfig
from .configuration_transmamba import SCHEDULES, parse_trans_points
from .errors import StudentError
from .mamba2 import Mamba2Mixer
from .modeling_hybrid import HybridForCausalLM
from .modeling_transmamba import TransMambaMixer, memory_converter
from .transfer import Transfer, TransferPlan, transfer_plan

AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)

__all__ = [
    "HybridCache",
    "HybridConfig",
    "HybridForCausalLM",
    "Mamba2Mixer",
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
