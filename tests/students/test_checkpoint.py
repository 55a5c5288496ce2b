"""Saving and loading a student, and its config."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from transpoint.students import HybridConfig, HybridForCausalLM, StudentError

FAMILIES = {
    "llama": {},
    "llama, untied, rotary base 700": {
        "family": "llama",
        "sizes": {
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
            "rms_norm_eps": 1e-3,
        },
    },
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "gate": False},
    "qwen3": {"family": "qwen3", "rope": True, "conv_kernel": 3},
    "all mixers": {"family": "llama", "keep_attention": ()},
    "transmamba": {"family": "qwen3", "mixer": "transmamba", "trans_points": [3, 0, "inf", 9]},
    "transmamba, all parts": {
        "family": "mistral",
        "keep_attention": (),
        "mixer": "transmamba",
        "trans_points": 9,
        "conv_kernel": 4,
        "conv_activation": "silu",
        "gate": True,
        "norm": True,
    },
    "bare": {"family": "qwen3", "norm": False, "gate": False, "conv_activation": None, "qk_norm": False},
}
EXACT = {"A_log", "dt_bias", "D"}


@torch.no_grad()
def logits(student):
    return student(torch.arange(24)[None] * 7 % 250).logits


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_saved_student_loads_with_equal_weights_and_logits(make_student, tmp_path, case):
    student = make_student(**case)
    student.generation_config.max_new_tokens = 7
    student.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, type(student)) and isinstance(loaded, PreTrainedModel) and not loaded.training
    weights, expected = loaded.state_dict(), student.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert torch.equal(logits(loaded), logits(student))
    assert loaded.config.mixers == student.config.mixers and loaded.generation_config.max_new_tokens == 7
    tied = student.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_student_loaded_in_bfloat16_keeps_decay_step_and_skip_in_float32(make_student, tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(student.named_parameters())
    seen = set()
    for name, parameter in loaded.named_parameters():
        last = name.split(".")[-1]
        seen.add(last)
        if last in EXACT and "self_attn" in name:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, expected[name])
        else:
            assert parameter.dtype == torch.bfloat16, name
    assert EXACT <= seen
    found = logits(loaded).float()
    assert (found - logits(student)).norm() / found.norm() < 0.1


def test_a_bfloat16_student_is_saved_and_loaded_as_it_is(make_student, tmp_path):
    student = make_student().to(torch.bfloat16)
    for mixer in student.mixer_layers():
        for name in EXACT if mixer is not None else ():
            getattr(mixer, name).data = getattr(mixer, name).data.float() + 1e-4
    student.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for (name, parameter), expected in zip(loaded.named_parameters(), student.parameters(), strict=True):
        assert parameter.dtype == expected.dtype and torch.equal(parameter, expected), name


def test_a_checkpoint_says_what_it_is(make_student, tmp_path):
    make_student("qwen3", rope=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "transpoint_hybrid" and written["base_model_type"] == "qwen3"
    assert written["architectures"] == ["HybridForCausalLM"]
    assert written["mixers"] == ["mamba2", "attention", "mamba2", "mamba2"]
    assert written["mixer_options"]["rope"] is True and written["head_dim"] == 32


def assert_same_config(found, expected):
    assert type(found) is type(expected)
    fields, expected_fields = (config.to_dict() | {"_name_or_path": ""} for config in (found, expected))
    assert fields == expected_fields


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_config_survives_every_round_trip(make_student, tmp_path, case):
    config = make_student(**case, stirred=False).config
    config.save_pretrained(tmp_path)
    assert isinstance(config, HybridConfig) and config.base_model_type == case.get("family", "llama")
    assert_same_config(HybridConfig.from_pretrained(tmp_path), config)
    assert_same_config(AutoConfig.from_pretrained(tmp_path), config)
    assert_same_config(copy.deepcopy(config), config)
    assert_same_config(HybridConfig.from_dict(config.to_dict()), config)
    other = copy.deepcopy(config)
    other.mixers[0] = other.mixer_options["conv_kernel"] = "changed"
    assert config.mixers[0] != "changed" and config.mixer_options["conv_kernel"] != "changed"


def test_a_config_is_both_ours_and_the_teachers(make_student):
    config = make_student(stirred=False).config
    assert isinstance(config, LlamaConfig) and config.model_type == "transpoint_hybrid"
    assert config.num_key_value_heads == 2 and config.rms_norm_eps == LlamaConfig().rms_norm_eps
    assert LlamaConfig().model_type == "llama"


def test_a_config_whose_mixers_are_not_its_layers_is_refused(make_student):
    fields = make_student(stirred=False).config.to_dict() | {"mixers": ["mamba2"] * 3}
    with pytest.raises(ValueError, match="mixers names 3 layers, the model has 4"):
        HybridConfig.from_dict(fields)


@pytest.mark.parametrize("base", ["no_such_type", None])
def test_a_config_of_an_unknown_model_type_is_refused(base):
    with pytest.raises(ValueError, match=f"base_model_type '{base}' is not a model type of this transformers version"):
        HybridConfig(base_model_type=base, mixers=[])


def test_students_errors_are_value_errors():
    assert issubclass(StudentError, ValueError)


def test_a_student_is_loaded_from_a_subfolder(make_student, tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path / "inner")
    assert torch.equal(logits(HybridForCausalLM.from_pretrained(tmp_path, subfolder="inner")), logits(student))


def test_a_student_is_loaded_from_a_revision_in_a_cache_of_the_hub(make_student, tmp_path):
    student, commit = make_student(), "a" * 40
    repository = tmp_path / "models--someone--student"
    student.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "second").write_text(commit)
    where = {"revision": "second", "cache_dir": tmp_path, "token": False, "local_files_only": True}
    assert torch.equal(logits(HybridForCausalLM.from_pretrained("someone/student", **where)), logits(student))
