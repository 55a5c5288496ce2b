from .build import build_student as build_student, plan_student as plan_student, untrained as untrained
from .config import StudentConfig as StudentConfig, layer_plan as layer_plan
from .modeling.cache import HybridCache as HybridCache, StateDifference as StateDifference
from .modeling.configuration_hybrid import MODEL_TYPE as MODEL_TYPE, HybridConfig as HybridConfig
from .modeling.configuration_mixers import MIXERS as MIXERS, MixerKind as MixerKind, Option as Option
from .modeling.configuration_transmamba import SCHEDULES as SCHEDULES, parse_trans_points as parse_trans_points
from .modeling.errors import StudentError as StudentError
from .modeling.mamba2 import Mamba2Mixer as Mamba2Mixer
from .modeling.modeling_hybrid import HybridForCausalLM as HybridForCausalLM
from .modeling.modeling_mixer import Geometry as Geometry, Mixer as Mixer, Transfer as Transfer
from .modeling.modeling_transmamba import TransMambaMixer as TransMambaMixer, memory_converter as memory_converter
from .modeling.softmax_attention import SoftmaxMixer as SoftmaxMixer
from .plans import PLANS as PLANS, Plan as Plan
from .swap import swap as swap
from .transfer import TransferPlan as TransferPlan, transfer_plan as transfer_plan
