"""A plugin of vLLM: Transpoint's custom exports with Mamba-2 layers, without their remote code."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .config import MODEL_TYPE, HybridConfig

    AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)
    ModelRegistry.register_model("HybridForCausalLM", "transpoint_vllm.model:HybridForCausalLM")
