"""vLLM's Llama, with Mamba-2 in some layers and q/k norms where the student has them."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from .config import HybridConfig


class HybridForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """A custom export of Transpoint whose mixers are all Mamba-2."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=HybridDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(_as_in_vllm(self.config, weights))
        if self.config.sentinel:
            last = f"model.layers.{self.config.num_hidden_layers - 1}."
            for name, parameter in self.named_parameters():
                if name.startswith(last):
                    parameter.data.zero_()
                    loaded.add(name)
        return loaded

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig):
        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.mamba2_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig):
        sizes = _sizes(vllm_config.model_config.hf_config)
        return MambaStateShapeCalculator.mamba2_state_shape(
            intermediate_size=sizes["num_heads"] * sizes["head_dim"],
            tp_world_size=vllm_config.parallel_config.tensor_parallel_size,
            n_groups=sizes["num_heads"],
            num_heads=sizes["num_heads"],
            head_dim=sizes["head_dim"],
            state_size=sizes["ssm_state_size"],
            conv_kernel=sizes["conv_kernel_size"],
            num_spec=vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.mamba2_state_copy_func()


class HybridDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: HybridConfig | None = None):
        config = config or vllm_config.model_config.hf_config
        mixed = config.mixers[extract_layer_index(prefix)] != "attention"
        made = partial(HybridMixer, vllm_config) if mixed else HybridAttention
        super().__init__(vllm_config, prefix, config, attn_layer_type=made)


class HybridAttention(LlamaAttention):
    """With the biases and q/k norms that the student's geometry says."""

    def __init__(self, *, config: HybridConfig, **options):
        biases = config.geometry["biases"]
        super().__init__(config=config, **{**options, "bias": "q_proj" in biases, "bias_o_proj": "o_proj" in biases})
        self.q_norm, self.k_norm = _norms(config, wanted=True)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = _normed(q, self.q_norm), _normed(k, self.k_norm)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class HybridMixer(MambaMixer2):
    """Mamba-2 with one group of B and C a head, to which x and B of fewer heads are expanded when they are loaded."""

    def __init__(self, vllm_config: VllmConfig, *, config: HybridConfig, prefix: str, **others):
        sizes, options = _sizes(config), config.mixer_options
        super().__init__(
            hidden_size=config.hidden_size,
            intermediate_size=sizes["num_heads"] * sizes["head_dim"],
            use_conv_bias=True,
            use_bias=True,
            n_groups=sizes["num_heads"],
            rms_norm_eps=options["norm_eps"],
            activation=options["conv_activation"],
            use_rms_norm=options["norm"],
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
            **sizes,
        )
        self.q_norm, self.k_norm = _norms(config, wanted=options["qk_norm"])
        # Without norms the scale is in the weights of C.
        self.scale = config.geometry["scale"] if self.q_norm is not None else 1.0
        self._split = self.split_hidden_states_B_C_fn
        self.split_hidden_states_B_C_fn = self._split_and_norm

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)

    def _split_and_norm(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B and C of what comes out of the convolution, in prefill and in decoding."""
        x, B, C = self._split(convolved)
        if self.q_norm is None:
            return x, B, C
        return x, _normed(B, self.k_norm), _normed(C, self.q_norm) * self.scale


def _sizes(config: HybridConfig) -> dict[str, int]:
    """Arguments of `MambaMixer2`."""
    heads, head_dim = config.geometry["num_heads"], config.geometry["head_dim"]
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "ssm_state_size": config.mixer_options["state_factor"] * head_dim,
        "conv_kernel_size": config.mixer_options["conv_kernel"],
    }


def _norms(config: HybridConfig, wanted: bool) -> tuple[nn.Module | None, nn.Module | None]:
    if not wanted or config.geometry["norm_over"] is None:
        return None, None
    head_dim, eps = config.geometry["head_dim"], config.rms_norm_eps
    return RMSNorm(head_dim, eps=eps), RMSNorm(head_dim, eps=eps)


def _normed(heads: Tensor, norm: nn.Module | None) -> Tensor:
    """Heads (tokens, heads * P), normed one at a time."""
    if norm is None:
        return heads
    return norm(heads.unflatten(-1, (-1, norm.weight.numel())).contiguous()).flatten(-2)


def _as_in_vllm(config: HybridConfig, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """An export's weights under the names and in the shapes of the modules above."""
    sizes, options = _sizes(config), config.mixer_options
    H, P, N = sizes["num_heads"], sizes["head_dim"], sizes["ssm_state_size"]
    held = H if options["expand_kv"] else config.geometry["num_kv_heads"]  # heads of x and B
    rows = {"z": H * P, "x": held * P, "B": held * N, "C": H * N, "dt": H}

    def expanded(tensor: Tensor, names: str) -> Tensor:
        parts = dict(zip(names.split(), tensor.split([rows[name] for name in names.split()]), strict=True))
        for name in ("x", "B"):
            parts[name] = parts[name].unflatten(0, (held, -1)).repeat_interleave(H // held, dim=0).flatten(0, 1)
        return torch.cat(list(parts.values()))

    for name, tensor in weights:
        _, _, parameter = name.partition(".self_attn.")
        if parameter.startswith(("conv1d.", "in_proj.")):
            tensor = expanded(tensor, "x B C" if parameter.startswith("conv1d.") else "z x B C dt")
        if parameter == "in_proj.weight" and not options["gate_bias"]:
            yield name.replace("weight", "bias"), tensor.new_zeros(len(tensor))
        if parameter == "z_bias":  # z comes first
            name = name.replace("z_bias", "in_proj.bias")
            tensor = torch.cat([tensor, tensor.new_zeros(H * (P + 2 * N + 1))])
        if parameter == "out_proj.weight" and "o_proj" not in config.geometry["biases"]:
            yield name.replace("weight", "bias"), tensor.new_zeros(len(tensor))
        yield name.replace("A_log", "A"), tensor
