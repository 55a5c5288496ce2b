"""Exports: what plain transformers makes of the folder is what was trained, and what cannot be held is refused."""

import copy
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeHybridForCausalLM,
    JambaForCausalLM,
    Qwen3_5ForCausalLM,
)

import fresh
import transpoint.distill.export.verify as verification
import transpoint.distill.export.write as writing
from distinct import distinct_student
from families import tiny_teacher
from transpoint.distill.config import Recipe
from transpoint.distill.data.corpus import Corpus
from transpoint.distill.data.packed import PackedDataset
from transpoint.distill.export import custom, granite, native, qwen3_5
from transpoint.distill.export.card import CardFacts, plan_in_letters, plan_in_words, write_card
from transpoint.distill.export.formats import FORMATS, ExportError, find_format
from transpoint.distill.export.write import export
from transpoint.distill.measure.held_out import HeldOut
from transpoint.students import HybridForCausalLM, StudentConfig, build_student
from transpoint.teachers import TeacherInfo
from transpoint.teachers.random import byte_tokenizer

ALL_PARTS = {"conv_kernel": 4, "conv_activation": "silu", "gate": True, "norm": True}
PLAIN = {"rope": True, "conv_activation": None, "gate": False, "norm": False}


def ids_of(batch=2, length=24):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2, **options)


def sampled(model, ids):
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=True, pad_token_id=2)


def assert_equal(found, expected):
    """To 1e-4 of the largest logit: float32, and a norm right after a sum that may all but cancel."""
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


# Native


GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 0.25}
NATIVE = {
    "llama": {},
    "llama-untied-conv2": {"keep": [0], "options": {"conv_kernel": 2}, "tie_word_embeddings": False},
    "llama-no-attention": {"keep": []},
    "llama-no-attention-conv2-untied": {"keep": [], "options": {"conv_kernel": 2}, "tie_word_embeddings": False},
    "llama-no-groups": {"num_key_value_heads": 4},
    "llama-one-kv-head": {"num_key_value_heads": 1},
    "llama-wide": {"head_dim": 32},
    "llama-own-heads": {"options": {"expand_kv": True}},
    "llama-gate-bias": {"options": {"gate_bias": True, "conv_kernel": 2}},
    "qwen2-gate-bias": {"family": "qwen2", "options": {"gate_bias": True}},
    "llama-biases-gate-bias": {"attention_bias": True, "options": {"gate_bias": True}},
    "llama-large-state": {"options": {"state_factor": 2}},
    "qwen2-own-heads-large-state": {"family": "qwen2", "options": {"expand_kv": True, "state_factor": 2}},
    "llama-biases": {"attention_bias": True},
    "llama-another-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral-windows-given-up": {"family": "mistral", "keep": []},
    "qwen2": {"family": "qwen2"},
    "qwen2-no-attention": {"family": "qwen2", "keep": []},
    "qwen2-untied-conv2": {"family": "qwen2", "options": {"conv_kernel": 2}, "tie_word_embeddings": False},
    "qwen2-no-positions": {"family": "qwen2", "options": {"attention_positions": False}},
    "smollm3-layers-with-positions": {"family": "smollm3", "keep": (1, 2)},
    "smollm3-the-one-without": {"family": "smollm3", "keep": (3,)},
    "granite": {"model_type": "granite", **GRANITE},
    "mixtral": {"model_type": "mixtral", "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite-experts-no-attention": {
        "model_type": "granitemoeshared",
        "keep": [],
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 24,
        **GRANITE,
    },
}


GDN = {"mixer": "gdn", "qk_norm": False}
NATIVE_GDN = {
    "qwen3": {"family": "qwen3"},
    "qwen3-tied-wide-conv2": {
        "family": "qwen3",
        "options": {"conv_kernel": 2},
        "tie_word_embeddings": True,
        "head_dim": 48,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
    },
    "qwen3-no-attention": {"family": "qwen3", "keep": []},
    "llama-no-attention-conv1-untied": {"keep": [], "options": {"conv_kernel": 1}, "tie_word_embeddings": False},
    "mistral-windows-given-up": {"family": "mistral", "keep": []},
    "smollm3-no-attention": {"family": "smollm3", "keep": []},
}


MAMBA1 = {"mixer": "mamba1", "selection": "x"}
NATIVE_MAMBA1 = {
    "llama": {},
    "qwen2-conv2-untied": {"family": "qwen2", "options": {"conv_kernel": 2}, "tie_word_embeddings": False},
    "qwen3-conv1": {"family": "qwen3", "options": {"conv_kernel": 1}},
    "llama-gate-bias": {"options": {"gate_bias": True}},
    "llama-biases": {"attention_bias": True},
    "llama-every-second": {"keep": (1, 3), "options": {"attention_positions": False}},
    "mistral-one": {
        "family": "mistral",
        "keep": (2,),
        "options": {"attention_positions": False},
        "sliding_window": None,
    },
    "mistral-windows-given-up": {"family": "mistral"},
}


def make_mamba1(options=None, keep=(), **given):
    return distinct_student(options=MAMBA1 | (options or {}), keep=keep, **given)


def make_gdn(options=None, **given):
    return distinct_student(options=GDN | (options or {}), **given)


@pytest.mark.parametrize("case", NATIVE)
def test_native_is_the_student_in_plain_transformers(case, tmp_path, unverified):
    student = distinct_student(**NATIVE[case])
    config = assert_native_is(student, GraniteMoeHybridForCausalLM, tmp_path, unverified)
    types = ["mamba" if mixer == "mamba2" else "attention" for mixer in student.config.mixers]
    has_no_positions = "softmax" in student.config.mixers or NATIVE[case].get("keep") == (3,)
    assert config["position_embedding_type"] == ("nope" if has_no_positions else "rope")
    assert config["layer_types"] == (types if "attention" in types else [*types, "attention"])
    assert config["model_type"] == "granitemoehybrid"
    assert config["num_local_experts"] == NATIVE[case].get("num_local_experts", 0)
    biased = any(
        mixer.z_bias is not None or mixer.out_proj.bias is not None
        for mixer, kind in zip(student.mixer_layers(), student.config.mixers, strict=True)
        if kind == "mamba2"
    )
    assert config["mamba_proj_bias"] == biased


@pytest.mark.parametrize("case", NATIVE_GDN)
def test_gated_deltanet_is_the_student_in_plain_transformers(case, tmp_path, unverified):
    student = make_gdn(**NATIVE_GDN[case])
    config = assert_native_is(student, Qwen3_5ForCausalLM, tmp_path, unverified)
    assert config["model_type"] == "qwen3_5_text"
    assert config["rope_parameters"].items() >= {"partial_rotary_factor": 1.0, **student.config.rope_parameters}.items()
    assert "It is a Qwen3.5 language model (`Qwen3_5ForCausalLM`)" in (tmp_path / "native" / "README.md").read_text()


@pytest.mark.parametrize("case", NATIVE_MAMBA1)
def test_mamba_1_is_the_student_in_plain_transformers(case, tmp_path, unverified):
    student = make_mamba1(**NATIVE_MAMBA1[case])
    config = assert_native_is(student, JambaForCausalLM, tmp_path, unverified, positions=False)
    mixer = student.mixer_layers()[0]
    assert config["mamba_proj_bias"] == (mixer.z_bias is not None or mixer.out_proj.bias is not None)
    assert (config["mamba_d_state"], config["mamba_dt_rank"], config["num_experts"]) == (16, mixer.rank, 1)


def assert_native_is(student, made, tmp_path, figures, positions=True):
    """An export is the student in a class of plain transformers. Returns its config.json.

    positions: whether the class knows any."""
    folder = tmp_path / "native"
    assert export(student, byte_tokenizer(), folder) == figures
    assert os.listdir(tmp_path) == ["native"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is made and model.dtype == torch.float32
    ids = ids_of()
    with torch.no_grad():
        expected = student(ids).logits
        assert_equal(model(ids).logits, expected)
        assert expected.std() > 0.5
        generated = greedy(student, ids)
        assert torch.equal(greedy(model, ids), generated)
        assert len(generated[0].unique()) > 3

        # The second row padded on the left: its own tokens are as without padding.
        padded = ids.clone()
        padded[1, :9] = 2
        mask = torch.ones_like(ids)
        mask[1, :9] = 0
        found, alone = model(padded, attention_mask=mask).logits, student(ids[1:, 9:]).logits
        assert_equal(found[0], expected[0])
        assert_equal(found[1, 9:], alone[0])
        both = greedy(model, padded, attention_mask=mask)
        assert torch.equal(both[0], generated[0])
        assert torch.equal(both[1, 24:], greedy(student, ids[1:, 9:])[0, 15:])
    assert AutoTokenizer.from_pretrained(folder)("Où?")["input_ids"] == byte_tokenizer()("Où?")["input_ids"]
    config = json.loads((folder / "config.json").read_text())
    if positions:
        theta = student.config.rope_parameters["rope_theta"]
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == theta
    else:
        assert "rope_theta" not in config and "rope_parameters" not in config
    assert "auto_map" not in config and not list(folder.glob("*.py"))
    return config


@pytest.mark.parametrize("make_one", [distinct_student, make_gdn, make_mamba1])
def test_every_mixer_parameter_shows_in_the_logits(make_one):
    """So that the comparisons above could not miss one."""
    student, generator = make_one(), torch.Generator().manual_seed(0)
    ids = ids_of()
    with torch.no_grad():
        expected = student(ids).logits
        mixer = student.mixer_layers()[0]
        rows = dict(
            zip(mixer.sizes, torch.arange(sum(mixer.sizes.values())).split(list(mixer.sizes.values())), strict=True)
        )
        places = [(mixer.in_proj.weight, part) for part in rows.values()]
        places += [(p, slice(None)) for n, p in mixer.named_parameters() if n != "in_proj.weight"]
        for parameter, part in places:
            before = parameter.detach().clone()
            # Not by one factor, which an RMS norm would take out again.
            parameter[part] *= 1 + 0.2 * torch.randn(parameter[part].shape, generator=generator)
            assert (student(ids).logits - expected).abs().max() > 1e-3
            parameter.copy_(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_one, exact",
    [
        (lambda: distinct_student(keep=[]), (".A_log", ".dt_bias", ".D")),
        (lambda: make_gdn(family="qwen3"), (".A_log", ".dt_bias", ".norm.weight", "q_norm.weight", "k_norm.weight")),
        (make_mamba1, (".A_log", ".dt_proj.bias", ".D")),
    ],
    ids=["mamba2", "gdn", "mamba1"],
)
def test_bfloat16_is_verified_in_a_process_without_transpoint(make_one, exact, tmp_path, monkeypatch):
    """Weights are rounded, decay, step and skip are not; what was rounded is then equal. Kernels for GPUs that
    transformers would take are left alone."""
    if make_one is make_mamba1:
        monkeypatch.setattr(verification, "subprocess", subprocess)  # a process of its own, not a forked one
        kernels = tmp_path / "site" / "mamba_ssm" / "ops" / "selective_scan_interface.py"
        kernels.parent.mkdir(parents=True)
        fails = "(*args, **kwargs): raise OSError('no GPU')\n"
        kernels.write_text("".join(f"def {name}{fails}" for name in ("selective_scan_fn", "mamba_inner_fn")))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    student = make_one()
    figures = export(student, byte_tokenizer(), tmp_path / "out", "native", torch.bfloat16)
    assert figures["logits"] < 1e-4 * figures["scale"] and 0 < figures["decode"] < 1e-4 * figures["scale"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{figures['logits']:.1e}" in card and f"{figures['decode']:.1e}" in card
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            assert file.get_tensor(name).dtype == (torch.float32 if name.endswith(exact) else torch.bfloat16), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        error = (model(ids_of()).logits - student(ids_of()).logits).norm() / student(ids_of()).logits.norm()
    assert 1e-4 < error < 0.1
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert half.dtype == torch.bfloat16 and greedy(half, ids_of()).shape == (2, 36)
    assert student.dtype == torch.float32


def test_small_norm_weights_of_gated_deltanet_live_through_bfloat16(tmp_path, unverified):
    """A weight of 0.02, as teachers have them, is no number of 16 bits less 1."""
    student = make_gdn(keep=[])
    with torch.no_grad():
        for layer in student.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.mul_(0.02)
            for linear in (layer.self_attn.in_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.mul_(50)
        expected = student(ids_of()).logits
        export(student, byte_tokenizer(), tmp_path / "out", "native", torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert model.dtype == torch.bfloat16
        assert (model(ids_of()).logits - expected).norm() < 0.06 * expected.norm()  # 0.45, were w - 1 written


# Custom


FRESH = """
import sys
sys.modules["transpoint"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, again, scratch = sys.argv[1:]
given = load_file(scratch + "/given.safetensors")
found = {}
for name, path in (("first", folder), ("second", again)):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    assert not type(model).__module__.startswith("transpoint."), type(model)
    with torch.no_grad():
        found[name + ".logits"] = model(given["ids"]).logits
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2)
    found[name + ".generated"] = model.generate(given["ids"], **options)
    if name == "second":
        break
    found["padded"] = model.generate(given["padded"], attention_mask=given["mask"], **options)
    beams = dict(attention_mask=given["mask"], num_beams=3, **options)
    found["beams"] = model.generate(given["padded"], **beams)
    torch.manual_seed(5)
    found["sampled"] = model.generate(given["ids"], **{**options, "do_sample": True})
    static = model.generate(given["padded"], attention_mask=given["mask"], cache_implementation="static", **options)
    assert torch.equal(static, found["padded"])
    cache = model.new_cache()
    with torch.no_grad():
        model(given["ids"][:, :12], cache=cache)
        cache.save(scratch + "/cache.safetensors")
        loaded = type(cache).load(scratch + "/cache.safetensors", model.config)
        for way, held in {"fork": cache.fork(), "loaded": loaded}.items():
            found[way] = model(given["ids"][:, 12:], cache=held).logits
    model.save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, scratch + "/found.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", PLAIN),
        ("qwen3", {"rope": True}),
        ("qwen3", {"mixer": "transmamba", "trans_points": [0, "inf", 14, 30]}),
        ("mistral", {"mixer": "transmamba", "trans_points": 20, **ALL_PARTS}),
        ("qwen2", {"mixer": "window_mamba2", "window": 6, "feature_map": "softmax"}),
        ("qwen2", {"mixer": "window_gdn", "window": 6}),
        ("qwen2", {"mixer": "s4d", "state_size": 8}),
        ("qwen2", {"mixer": "mamba1"}),
    ],
    ids=["plain", "qwen3", "transmamba", "transmamba, all parts", "window", "gated delta rule", "s4d", "Mamba-1"],
)
def test_custom_goes_with_its_own_code_and_is_saved_with_it(family, options, tmp_path, unverified):
    student = distinct_student(family, options=options)
    folder, again = tmp_path / "custom", tmp_path / "again"
    export(student, byte_tokenizer(), folder, "custom")
    assert os.listdir(tmp_path) == ["custom"]
    ids, mask = ids_of(), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    padded = ids.masked_fill(mask == 0, 2)
    save_file({"ids": ids, "mask": mask, "padded": padded}, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", FRESH, str(folder), str(again), str(tmp_path)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = fresh.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        expected = student(ids).logits
    generated = greedy(student, ids)
    for name in ("first", "second"):  # as exported, and as what was loaded saves itself
        assert_equal(found[f"{name}.logits"], expected)
        assert torch.equal(found[f"{name}.generated"], generated)
    assert torch.equal(found["padded"], greedy(student, padded, attention_mask=mask))
    assert torch.equal(found["beams"], greedy(student, padded, attention_mask=mask, num_beams=3))
    torch.manual_seed(5)
    assert torch.equal(found["sampled"], sampled(student, ids))
    for way in ("fork", "loaded"):
        assert_equal(found[way], expected[:, 12:])
    own, copied = ({path.name: path.read_text() for path in place.glob("*.py")} for place in (folder, again))
    assert own == copied and {"modeling_hybrid.py", "configuration_transmamba.py"} <= own.keys()
    assert ("modeling_transmamba.py" in own) == ("transmamba" in student.config.mixers)


@pytest.mark.slow
def test_trans_points_are_verified_in_layers_that_the_schedule_leaves_to_attention(tmp_path, monkeypatch):
    """The state-space form of a layer with a late TransPoint is compared too."""
    options = {"mixer": "transmamba", "trans_points": "inf"}
    figures = export(distinct_student(keep=[], options=options), byte_tokenizer(), tmp_path / "right", "custom")
    assert figures["logits"] < 1e-4 * figures["scale"] and 0 < figures["decode"] < 1e-4 * figures["scale"]
    real = custom.write

    def without_skip(student, folder, dtype):
        wrong = copy.deepcopy(student)
        wrong.model.layers[2].self_attn.D.data += 1
        real(wrong, folder, dtype)

    monkeypatch.setitem(FORMATS, "custom", dataclasses.replace(custom.CUSTOM, write=without_skip))
    with pytest.raises(ExportError, match="is not equal to the student: logits differ by"):
        export(distinct_student(keep=[], options=options), byte_tokenizer(), tmp_path / "wrong", "custom")


def test_trans_points_are_chosen_where_an_export_is_loaded(tmp_path, unverified):
    student = distinct_student(keep=[], options={"mixer": "transmamba", "trans_points": 5})
    export(student, byte_tokenizer(), tmp_path / "out", "custom")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["measured_trans_points"] = [{"trans_points": [9] * 4, "trained": False, "quality": {"kl": 0.5}}]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="this student was not trained on TransPoints 9 in every layer: kl 0.5"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, trans_points="uniform:9")
    assert not type(model).__module__.startswith("transpoint.") and model.trans_points == [9] * 4
    assert student.trans_points == [5] * 4
    student.set_trans_points(9, warn=False)
    with torch.no_grad():
        assert_equal(model.eval()(ids_of()).logits, student(ids_of()).logits)


def test_native_refuses_trans_points_before_and_after_training(tmp_path):
    reason = "a layer of it is attention or Mamba-2, not one up to a TransPoint and then the other"
    student = distinct_student(options={"mixer": "transmamba"})
    assert refusal(student, tmp_path) == f"native cannot hold this student: {reason}; use format custom"
    config = StudentConfig(mixer="transmamba")
    assert native.why_no_student(config) == f"{reason}; use export.format=custom"
    assert find_format("custom").why_no_student(config) is None and native.why_no_student(StudentConfig()) is None


def test_native_refuses_what_no_class_has_of_kept_attention_before_it_is_made():
    reason = "its attention has no sliding window; use export.format=custom"
    assert native.why_no_student(StudentConfig(attention_window=9)) == reason
    assert native.why_no_student(StudentConfig(attention_positions=False)) is None
    reason = "its attention is the teacher's, without a window and with positions; use export.format=custom"
    assert native.why_no_student(StudentConfig(mixer="gdn", attention_positions=False)) == reason
    assert native.why_no_student(StudentConfig(mixer="softmax")).startswith("it holds Mamba-2 layers")


def test_native_refuses_gated_deltanet_that_no_class_has_before_it_is_made():
    reason = "its gated DeltaNet layer is fixed in student.rope (must be false); use export.format=custom"
    assert native.why_no_student(StudentConfig(mixer="gdn", rope=True)) == reason
    assert native.why_no_student(StudentConfig(mixer="gdn")) is None


@pytest.mark.parametrize("format", ["native", "gguf"])
def test_s4d_is_refused_where_no_class_has_it(format):
    reason = "it holds Mamba-2 layers, and student.mixer is s4d; use export.format=custom"
    assert find_format(format).why_no_student(StudentConfig(mixer="s4d")) == reason
    assert find_format("custom").why_no_student(StudentConfig(mixer="s4d")) is None


def test_a_card_shows_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    recipe = Recipe()
    recipe.run.dir, recipe.run.reuse = f"{tmp_path}/run", [f"{tmp_path}/other", "~/third"]
    recipe.teacher.source = "owner/model"  # a folder here
    recipe.data.train = [f"{tmp_path}/texts/*.jsonl", "hub:a/b", "sub/c.jsonl"]
    recipe.data.heldout, recipe.data.cache = ["../held.jsonl"], f"{tmp_path}/cache"
    recipe.synthesize.prompts, recipe.synthesize.out = [f"{tmp_path}/q.jsonl"], f"{tmp_path}/out"
    recipe.distill.teacher_cache = f"{tmp_path}/teacher-cache"
    recipe.evaluate.prompts = ["/is this a path?"]
    facts = CardFacts(TeacherInfo("odd_[name]*"), recipe.to_dict())
    write_card(tmp_path, distinct_student(), native.NATIVE, {"scale": 1.0, "logits": 0.0, "decode": 0.0}, facts)
    text = (tmp_path / "README.md").read_text()
    for word in (str(tmp_path), "owner", "~", "../", "sub/"):
        assert word not in text, word
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["data"]["train"] == ["*.jsonl", "hub:a/b", "c.jsonl"] and shown["run"]["reuse"] == ["other", "third"]
    assert shown["teacher"]["source"] == "model" and shown["evaluate"]["prompts"] == ["/is this a path?"]
    assert "hybrid of odd\\_\\[name\\]\\*" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"


def test_a_mixer_that_the_card_does_not_know_goes_by_its_name():
    assert plan_in_letters(["attention", "hyena", "mamba2", "hyena"]) == "AHMH"
    assert plan_in_words(["attention", "hyena", "mamba2"]) == "1 of 3 layers are Mamba-2, 1 of 3 layers are hyena"


# The tokenizer


def left_padding():
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return tokenizer


@pytest.mark.parametrize("format", ["native", "custom"])
def test_the_tokenizer_is_the_students(format, tmp_path, unverified):
    tokenizer = left_padding()
    export(distinct_student(), tokenizer, tmp_path / "out", format)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = ["a bc", "a longer prompt", "<|im_start|>"]
    assert dict(found(batch, padding=True)) == dict(tokenizer(batch, padding=True))
    assert found.truncation_side == "left" and found.chat_template == tokenizer.chat_template
    assert found.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize(
    "change, what",
    [
        ({"padding_side": "right"}, "padding side"),
        ({"chat_template": "{{ messages }}"}, "chat template"),
        ({"eos_token": "<|endoftext|>"}, "ids"),
    ],
)
def test_a_tokenizer_that_is_another_one_when_it_is_loaded_is_refused(change, what, tmp_path, monkeypatch):
    real = verification.save_tokenizer

    def changed(tokenizer, folder):
        other = copy.deepcopy(tokenizer)
        for name, value in change.items():
            setattr(other, name, value)
        real(other, folder)

    for module in (verification, writing):
        monkeypatch.setattr(module, "save_tokenizer", changed)
    reason = f"the tokenizer is another one when it is loaded with what was written: its {what} differ"
    with pytest.raises(ExportError, match=reason):
        native.NATIVE.check_tokenizer(distinct_student(), left_padding())
    if what == "padding side":
        with pytest.raises(ExportError, match=reason):
            export(distinct_student(), left_padding(), tmp_path / "out")
        assert not os.listdir(tmp_path)


def test_an_export_that_the_project_loads_and_saves_again_carries_its_code(tmp_path, unverified):
    student = distinct_student(options={"mixer": "transmamba", "trans_points": 5})
    export(student, byte_tokenizer(), tmp_path / "first", "custom")
    HybridForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    first, again = ({path.name for path in (tmp_path / name).glob("*.py")} for name in ("first", "again"))
    assert first == again and len(first) == 17 and "mamba2.py" not in first
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert not type(model).__module__.startswith("transpoint.")
    with torch.no_grad():
        assert_equal(model.eval()(ids_of()).logits, student(ids_of()).logits)
    student.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))


# What is refused


def fixed(*names, layer="Mamba-2"):
    return f"its {layer} layer is fixed in {', '.join(names)}; use format custom"


ROPE, ACTIVATION = "student.rope (must be false)", "student.conv_activation (must be silu)"
GATE, NORM, QK = "student.gate (must be true)", "student.norm (must be true)", "student.qk_norm (must be false)"
REFUSED = {
    "rope": ({"options": {"rope": True}}, fixed(ROPE)),
    "activation": ({"options": {"conv_activation": None}}, fixed(ACTIVATION)),
    "gate": ({"options": {"gate": False}}, fixed(GATE)),
    "norm": ({"options": {"norm": False}}, fixed(NORM)),
    "all of these": ({"options": PLAIN}, fixed(ROPE, ACTIVATION, GATE, NORM)),
    "family": (
        {"family": "qwen3"},
        "it holds what llama, mistral, qwen2, smollm3, seed_oss, exaone, internlm3, iquestcoder, mixtral, granite, "
        "granitemoe, granitemoeshared have, not qwen3; use format custom",
    ),
    "window": (
        {"family": "mistral"},
        "its attention has no sliding window (16 tokens here); use format custom",
    ),
    "layers without positions beside others": (
        {"family": "smollm3"},
        "either all of its attention has positions, or none; use format custom",
    ),
    "window of kept attention": (
        {"options": {"attention_window": 9}},
        "its attention has no sliding window (9 tokens here); use format custom",
    ),
    "kept attention of a gated DeltaNet": (
        {"family": "qwen3", "options": GDN | {"attention_positions": False}},
        "it holds gated DeltaNet layers, not softmax; use format custom",
    ),
    "softmax attention alone": (
        {"options": {"mixer": "softmax"}},
        "it holds Mamba-2 layers, not attention, softmax; use format custom",
    ),
    "width": (
        {"head_dim": 24},
        "its Mamba-2 width must be a multiple of the hidden size 64, and 4 heads of 24 are not; use format custom",
    ),
    "activation of the MLP": (
        {"hidden_act": "gelu"},
        "its activation is silu throughout, not gelu; use format custom",
    ),
    "biases of the MLP": ({"mlp_bias": True}, "its MLP has no biases; use format custom"),
    "gated DeltaNet, all of these": (
        {"keep": [], "options": GDN | {"rope": True, "conv_activation": None, "gate": False, "gate_bias": True}},
        fixed(ROPE, ACTIVATION, GATE, "student.gate_bias (must be false)", layer="gated DeltaNet"),
    ),
    "gated DeltaNet, q/k norms": (
        {"family": "qwen3", "options": {"mixer": "gdn"}},
        fixed(QK, layer="gated DeltaNet"),
    ),
    "gated DeltaNet, attention without q/k norms": (
        {"options": GDN},
        "its attention norms queries and keys, which that of a llama does not: keep none (student.keep_attention=[]), "
        "or use format custom",
    ),
    "gated DeltaNet, biases": (
        {"family": "qwen2", "keep": [], "options": GDN},
        "its layers have no biases, and the teacher's k_proj, q_proj, v_proj have; use format custom",
    ),
    "Mamba-1, all of these": (
        {"keep": [], "options": MAMBA1 | {"conv_activation": None, "gate": False, "norm": True}},
        fixed(ACTIVATION, GATE, "student.norm (must be false)", layer="Mamba-1"),
    ),
    "Mamba-1, attention": (
        {"options": MAMBA1},
        "its attention has no positions, and that of a llama has rotary ones: set student.attention_positions=false, "
        "keep none (student.keep_attention=[]), or use format custom",
    ),
    "Mamba-1, attention at unequal distances": (
        {"keep": (0, 1, 3), "options": MAMBA1 | {"attention_positions": False}},
        "its attention comes in every so many layers, and here in [0, 1, 3]; use format custom",
    ),
    "Mamba-1, attention with biases": (
        {"family": "qwen2", "options": MAMBA1 | {"attention_positions": False}},
        "its attention has no q/k norms and no biases; use format custom",
    ),
    "Mamba-1, width": (
        {"keep": [], "options": MAMBA1, "head_dim": 24},
        "its Mamba-1 width must be a multiple of the hidden size 64, and 4 heads of 24 are not; use format custom",
    ),
    "gated DeltaNet, window": (
        {"family": "qwen3", "options": GDN, "use_sliding_window": True, "sliding_window": 16},
        "its attention has no sliding window (16 tokens here); use format custom",
    ),
}


FROM_HIDDEN = (
    "its Mamba-1 layer makes steps, B and C of x, the same for all channels, and so none of a teacher's keys and "
    "queries: set student.selection=x, where they are learned from scratch, or use "
)


def test_mamba_1_of_a_teachers_keys_and_queries_has_no_class(tmp_path):
    assert native.why_no_student(StudentConfig("mamba1")) == f"{FROM_HIDDEN}export.format=custom"
    reason = "its Mamba-1 layer is fixed in student.norm (must be false); use export.format=custom"
    assert native.why_no_student(StudentConfig("mamba1", selection="x", norm=True)) == reason
    assert native.why_no_student(StudentConfig("mamba1", selection="x")) is None
    student = distinct_student(keep=[], options={"mixer": "mamba1"})
    assert refusal(student, tmp_path) == f"native cannot hold this student: {FROM_HIDDEN}format custom"


def test_a_family_whose_layers_are_others():
    """OLMo-2 norms what comes out of attention, and no class with gated DeltaNet layers does."""
    student = build_student(tiny_teacher("olmo2"), StudentConfig(keep_attention=[1], **GDN))
    families = "llama, mistral, qwen2, smollm3, seed_oss, exaone, internlm3, iquestcoder, qwen3"
    assert native.why_not(student) == f"it holds what {families} have, not olmo2; use format custom"


def refusal(student, tmp_path, format="native"):
    """The message of the refusal, which leaves a folder that is there as it is and makes no other."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "none"):
        with pytest.raises(ExportError) as caught:
            export(student, byte_tokenizer(), folder, format)
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine.txt"]
    return str(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_native_cannot_hold(case, tmp_path):
    arguments, reason = REFUSED[case]
    assert refusal(distinct_student(**arguments), tmp_path) == f"native cannot hold this student: {reason}"


@pytest.mark.parametrize(
    "qk_norm, reason", [(True, fixed(QK)), (False, "its attention has no q/k norms; use format custom")]
)
def test_query_and_key_norms(qk_norm, reason, tmp_path, monkeypatch):
    """Of a family that is native but for them."""
    monkeypatch.setattr(granite, "FAMILIES", ("qwen3",))
    student = distinct_student("qwen3", options={"qk_norm": qk_norm})
    assert refusal(student, tmp_path) == f"native cannot hold this student: {reason}"


def test_transformers_that_would_compute_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(granite.transformers, "__version__", "5.22.1")
    assert refusal(distinct_student(), tmp_path) == (
        "native cannot hold this student: transformers 5.22.1 normalises all heads of a Mamba-2 layer together; "
        "it takes 5.23 or later, or format custom"
    )


def test_an_unknown_format(tmp_path):
    assert (
        refusal(distinct_student(), tmp_path, "onnx")
        == "format 'onnx' is not known; expected one of native, custom, gguf"
    )


@pytest.mark.slow
def test_an_export_that_is_not_equal_is_caught(tmp_path, monkeypatch):
    """Heads of C in another order: every shape fits, and every logit is wrong."""

    def shuffled(student, dtype):
        state = granite.state_of(student)
        for name, tensor in state.items():
            if name.endswith("mamba.in_proj.weight"):
                z, x, b, c, dt = tensor.split([64, 64, 64, 64, 4])
                state[name] = torch.cat([z, x, b, c.unflatten(0, (4, 16)).roll(1, 0).flatten(0, 1), dt])
        return state

    monkeypatch.setitem(native.HOMES, "mamba2", dataclasses.replace(granite.GRANITE, state=shuffled))
    with pytest.raises(ExportError, match=r"is not equal to the student: logits differ by .*, more than [0-9.e-]+$"):
        export(distinct_student(), byte_tokenizer(), tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_weights_laid_out_as_another_student_are_caught(tmp_path, monkeypatch):
    """Though what is written is equal to them."""

    def without_a_norm(student, dtype):
        weights = qwen3_5.weights_of(student, dtype)
        return weights | {"model.norm.weight": torch.ones_like(weights["model.norm.weight"])}

    monkeypatch.setitem(native.HOMES, "gdn", dataclasses.replace(qwen3_5.QWEN3_5, weights=without_a_norm))
    with pytest.raises(ExportError, match=r"is not equal to the student: logits differ by .*, more than [0-9.e-]+$"):
        export(make_gdn(keep=[]), byte_tokenizer(), tmp_path / "native", "native", torch.bfloat16)
    assert not (tmp_path / "native").exists()


@pytest.mark.slow
def test_an_export_that_does_not_load_is_caught(tmp_path, monkeypatch):
    def write(student, folder, dtype):
        (folder / "config.json").write_text('{"model_type": "no_such_model"}')

    monkeypatch.setitem(FORMATS, "native", dataclasses.replace(native.NATIVE, write=write))
    with pytest.raises(ExportError, match="does not load without Transpoint: ") as caught:
        export(distinct_student(), byte_tokenizer(), tmp_path / "native")
    assert "\n" not in str(caught.value) and not (tmp_path / "native").exists()


def test_a_failed_write_leaves_the_earlier_export(tmp_path, monkeypatch, unverified):
    student = distinct_student()
    export(student, byte_tokenizer(), tmp_path / "native")
    before = (tmp_path / "native" / "model.safetensors").read_bytes()

    def write_card(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_card", write_card)
    with pytest.raises(OSError, match="No space left"):
        export(student, byte_tokenizer(), tmp_path / "native")
    assert os.listdir(tmp_path) == ["native"]
    assert (tmp_path / "native" / "model.safetensors").read_bytes() == before


# The card


def facts_of(tmp_path, license="mit"):
    recipe = Recipe()
    recipe.run.dir = str(tmp_path / "secret-run")
    recipe.data.train = [str(tmp_path / "secret" / "books.jsonl"), "hub:o/n"]
    recipe.data.cache = str(tmp_path / "secret-cache")
    recipe.teacher.source = str(tmp_path / "secret" / "teacher-1b")
    quality = {"tokens": 12345, "perplexity": 21.957, "bits_per_byte": 1.0239, "kl": 0.0, "same_top": 1.0}
    return CardFacts(
        TeacherInfo("owner/teacher-1b", license, "owner/teacher-1b", "0123abc"),
        recipe.to_dict(),
        {"align": 6_000_000, "distill": 12_000_000},
        [
            {"model": "teacher", **quality},
            {"model": "after distill", **quality, "kl": 0.1987, "same_top": 0.7619},
            {"model": "unmeasured", **quality, "kl": None, "same_top": None},
        ],
    )


def card(tmp_path, facts, format="native", keep=(1, 3)):
    export(distinct_student(keep=keep), byte_tokenizer(), tmp_path / "out", format, facts=facts)
    return (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("format", ["native", "custom"])
def test_the_card_says_where_it_comes_from_and_what_was_measured(format, tmp_path, unverified, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_marker")
    text = card(tmp_path, facts_of(tmp_path), format)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit" and front["base_model"] == "owner/teacher-1b"
    assert front["library_name"] == "transformers" and "transpoint" in front["tags"]
    assert "[owner/teacher-1b](https://huggingface.co/owner/teacher-1b) (commit `0123abc`)\nare" in text
    assert "Licence: that of the teacher, mit." in text
    assert "first layer to last: `MAMA`" in text and "2 of the 4 attention layers" in " ".join(text.split())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [6] * 5
    assert rows[2] == "| teacher | 21.96 | 1.0239 | 0.0000 | 100.0 % |"
    assert rows[3] == "| after distill | 21.96 | 1.0239 | 0.1987 | 76.2 % |"
    assert [cell.strip() for cell in rows[4].split("|")] == ["", "unmeasured", "21.96", "1.0239", "", "", ""]
    assert "Measured on 12,345 tokens." in text
    assert "- align: 6,000,000 tokens" in text and "- distill: 12,000,000 tokens" in text
    assert "at most 1.0e-06" in " ".join(text.split()) and "at most 2.0e-06" in " ".join(text.split())
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["teacher"]["source"] == "teacher-1b" and recipe["data"]["train"] == ["books.jsonl", "hub:o/n"]
    assert recipe["distill"] == Recipe().to_dict()["distill"]
    assert str(tmp_path) not in text and "secret" not in text and "hf_marker" not in text
    assert ("trust_remote_code" in text.split("```python")[1].split("```")[0]) == (format == "custom")


@pytest.mark.slow
@pytest.mark.parametrize("format, made", [("native", "GraniteMoeHybridForCausalLM"), ("custom", "HybridForCausalLM")])
def test_the_cards_code_loads_the_model_and_asks_nothing(format, made, tmp_path, unverified):
    """In a process without Transpoint and without a terminal."""
    text = card(tmp_path, facts_of(tmp_path), format)
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER_OR_HUB_ID", str(tmp_path / "out"))
    code = f"import sys\nsys.modules['transpoint'] = None\n{code}"
    code += "\nprint(type(model).__name__, len(tokenizer('abc')['input_ids']))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = fresh.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{made} ") and "[y/N]" not in done.stdout + done.stderr


def test_the_card_warns_of_programs_that_compute_something_else(tmp_path, unverified):
    text = card(tmp_path, None)
    assert "- vLLM 0.32: the same\n" in text
    norm = "it norms all heads of a Mamba-2 layer together"
    assert f"- **mistral.rs 0.9.2 computes something else, without a word**: {norm}\n" in text


@pytest.mark.parametrize("keep, interval", [((1, 3), 2), ((3,), 4), ((), 5), ((0, 2), None)])
def test_engines_that_want_attention_at_intervals_are_told_them(keep, interval, tmp_path, unverified):
    """A student without attention has a layer of it appended."""
    folder = tmp_path / "out"
    export(distinct_student("qwen3", keep=keep, options={"mixer": "gdn", "qk_norm": False}), byte_tokenizer(), folder)
    written = json.loads((folder / "config.json").read_text())
    assert written.get("full_attention_interval") == interval and written["partial_rotary_factor"] == 1.0
    said = (folder / "README.md").read_text()
    assert ("SGLang 0.5.23: does not load it: it takes attention at regular intervals" in said) == (interval is None)


def test_a_card_without_facts(tmp_path, unverified):
    text = card(tmp_path, None, keep=())
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "unknown" and "base_model" not in front
    assert "Licence: the teacher's, which could not be read from its files" in text
    assert "`MMMM`" in text and "## Quality" not in text and "## Training" not in text and "## Recipe" not in text


def test_what_is_no_export_is_not_replaced(tmp_path, unverified):
    student, tokenizer = distinct_student(), byte_tokenizer()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="is there and is no earlier export: name another folder, or remove it"):
        export(student, tokenizer, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for _ in range(2):  # an earlier export is replaced
        export(student, tokenizer, tmp_path / "out")


def test_packed_documents_are_measured_alike_in_student_and_export(tmp_path, unverified):
    """A native export cannot tell packed documents apart in its Mamba layers: quality takes them one by one."""
    student, tokenizer = distinct_student(), byte_tokenizer()
    export(student, tokenizer, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(3, 250, (96,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    corpus = Corpus(tokens, torch.tensor([0, 20, 50, 71]), "made up")
    held_out = HeldOut(PackedDataset(corpus, 48), 2, tokenizer, student)
    assert held_out.measure(reloaded).kl == pytest.approx(0, abs=1e-5)
    assert held_out.measure(reloaded).perplexity == pytest.approx(held_out.measure(student).perplexity, rel=1e-4)
