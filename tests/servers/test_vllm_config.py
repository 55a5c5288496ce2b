"""The plugin's config: what vLLM is told of an export, and what it refuses to serve. Without vLLM."""

import pytest

from transpoint.distill.export.custom import CUSTOM
from transpoint.distill.export.engines import REFUSES, TRIED
from transpoint.students import Mamba2Mixer, StudentConfig, build_student
from transpoint.teachers.random import random_teacher
from transpoint_vllm.config import HybridConfig


def student_of(family="llama", keep=(1,), sizes=None, **options):
    teacher, _ = random_teacher(f"random-{family}", **(sizes or {}))
    return build_student(teacher, StudentConfig(keep_attention=list(keep), **options))


def saved(*args, **options):
    """What is in the config's file."""
    return student_of(*args, **options).config.to_diff_dict()


def test_layers_are_told_by_their_mixers():
    config = HybridConfig.from_dict(saved("qwen3"))
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    assert config.rms_norm_eps == 1e-6 and config.num_key_value_heads == 2 and config.hidden_act == "silu"
    assert not config.sentinel and config.model_type == "transpoint_hybrid"


def test_what_an_earlier_version_left_unsaid_is_as_by_default():
    mixer = Mamba2Mixer.__init__.__kwdefaults__
    assert HybridConfig.from_dict({**saved(), "mixer_options": {}}).mixer_options == mixer


def test_without_attention_there_is_a_layer_more():
    config = HybridConfig.from_dict(saved(keep=[]))
    assert config.sentinel and config.num_hidden_layers == 5
    assert config.mixers == ["mamba2"] * 4 + ["attention"]
    assert config.layer_types == ["linear_attention"] * 4 + ["full_attention"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rope": True}, "take positions .student.rope must be false"),
        ({"gate": False}, "have no gate .student.gate must be true"),
        ({"conv_kernel": 1}, "has 1 taps .student.conv_kernel must be 2 to 4"),
        ({"mixer": "gdn"}, "layers of gdn, and serves attention and mamba2"),
        ({"mixer": "mamba1"}, "layers of mamba1, and serves attention and mamba2"),
        ({"mixer": "transmamba", "trans_points": [0, "inf", 14, 30]}, "layers of transmamba"),
        ({"mixer": "window_mamba2", "window": 6, "feature_map": "softmax"}, "layers of window_mamba2"),
        ({"family": "mistral"}, "attention of layer 1 has a window of 16 tokens"),
        ({"sizes": {"hidden_act": "gelu"}}, "its MLP has gelu, and must have silu"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(changes, reason):
    with pytest.raises(ValueError, match=f"^transpoint-vllm cannot serve this student: .*{reason}"):
        HybridConfig.from_dict(saved(**changes))


def test_a_window_that_no_text_passes_is_none():
    assert HybridConfig.from_dict(saved("mistral", sizes={"sliding_window": 512})).mixers[1] == "attention"
    assert HybridConfig.from_dict(saved("mistral", keep=[])).sentinel


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"base_model_type": "olmo2"}, "its teacher is a olmo2, and has to be one of"),
        ({"mixers": ["attention"] * 4}, "none of its layers is mamba2: serve its teacher"),
        ({"geometry": None}, "no geometry"),
    ],
    ids=str,
)
def test_other_configs_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        HybridConfig.from_dict({**saved(), **changes})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"family": "qwen3"},
        {"family": "mistral"},
        {"family": "mistral", "keep": []},
        {"rope": True},
        {"gate": False},
        {"conv_kernel": 1},
        {"norm": False, "conv_activation": None},
        {"sizes": {"hidden_act": "gelu"}},
        {"mixer": "gdn"},
    ],
    ids=str,
)
def test_a_card_says_that_it_serves_what_it_does(given):
    student = student_of(**given)
    (engine,) = [one for one in CUSTOM.engines(student) if one.name.startswith("vLLM")]
    try:
        HybridConfig.from_dict(student.config.to_diff_dict())
    except ValueError:
        assert engine.does == REFUSES
    else:
        assert engine.does == TRIED
