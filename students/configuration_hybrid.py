"""The config of a hybrid student: its teacher's config, flat, and what sits in each layer.

This file travels with exported checkpoints: it imports transformers only.
"""

from transformers import CONFIG_MAPPING, PreTrainedConfig

MODEL_TYPE = "transpoint_hybrid"


class HybridConfig(PreTrainedConfig):
    """Every field of the teacher's config, and three of ours.

    Fields:
        base_model_type: the teacher's `model_type` ("llama"): whose module tree the student is.
        mixers: for each layer what replaces self-attention, "mamba2", or "attention" where it is kept.
        mixer_options: keyword arguments of the mixer's class.

    `HybridConfig(base_model_type=..., ...)`, `from_dict` and `from_pretrained` give an instance of a class that is
    both this one and the teacher's config class.
    """

    model_type = MODEL_TYPE

    base_model_type: str | None = None
    mixers: list[str] | None = None
    mixer_options: dict | None = None

    def __new__(cls, *args, base_model_type: str | None = None, **kwargs):
        return super().__new__(hybrid_config_class(base_model_type) if cls is HybridConfig else cls)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mixers is not None and len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers names {len(self.mixers)} layers, the model has {self.num_hidden_layers}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if cls is HybridConfig:
            cls = hybrid_config_class(config_dict.get("base_model_type"))
        return super().from_dict(config_dict, **kwargs)


def hybrid_config_class(base_model_type: str | None) -> type[HybridConfig]:
    """The class that is both a `HybridConfig` and the config of `base_model_type` (one class for each type).

    Raises:
        ValueError: transformers has no such model type.
    """
    if base_model_type not in _CLASSES:
        if base_model_type not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type '{base_model_type}' is not a model type of this transformers version")
        fields = {"model_type": MODEL_TYPE, "__module__": __name__}
        # The name is the public one: saved checkpoints refer to it.
        _CLASSES[base_model_type] = type("HybridConfig", (HybridConfig, CONFIG_MAPPING[base_model_type]), fields)
    return _CLASSES[base_model_type]


_CLASSES: dict[str, type[HybridConfig]] = {}
