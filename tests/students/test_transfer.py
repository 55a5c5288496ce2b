"""Weight transfer: what a student computes from its teacher's weights, and the plan that says which go where."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from transpoint.students import StudentConfig, StudentError, Transfer, build_student, plan_student, transfer_plan
from transpoint.teachers import TeacherError
from transpoint.teachers.random import random_teacher

LENGTH = 40  # more than one chunk of the scan
BARE = {"conv_activation": None, "gate": False, "norm": False}

# Family and fields of its config: head pairings, biases, norms, head_dim of its own, tied and untied embeddings.
TEACHERS = {
    "4 heads over 2": ("llama", {}),
    "6 heads over 3": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "6 heads over 2": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "4 heads over 1": ("llama", {"num_key_value_heads": 1}),
    "4 heads over 4": ("llama", {"num_key_value_heads": 4}),
    "biases": ("qwen2", {}),
    "biases, o too": ("llama", {"attention_bias": True}),
    "q and k norms, head_dim 32 of hidden 64": ("qwen3", {}),
    "q and k norms, 6 heads over 3": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    "head_dim 24 of hidden 64": ("llama", {"head_dim": 24}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "window": ("mistral", {}),
}


def teacher_of(case, dtype=torch.float32):
    family, fields = TEACHERS[case]
    return random_teacher(f"random-{family}", 2, **fields)[0].to(dtype)


def build(teacher, **options):
    return build_student(teacher, StudentConfig(**{"keep_attention": [], **BARE, **options}))


def remember_everything(mixer):
    """Decay 1: then the mixer is linear attention."""
    torch.testing.assert_close(F.softplus(mixer.dt_bias), torch.ones(mixer.num_heads), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        mixer.A_log.fill_(-math.inf)


def rotated(t, base):
    """Rotary embedding of t (B,L,heads,P) as defined: dimensions i and i + P/2 turn by position * base^(-2i/P)."""
    length, size = t.shape[1], t.shape[-1]
    angle = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    turned = torch.complex(*t.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1).to(t.dtype)


def linear_attention(attention, hidden, heads, head_dim, rope_base=None, qk_norm=True, pair=None):
    """What attention computes without its softmax: o_proj(concat_h sum_{s<=t} scale (q_t . k_s) v_s), head by head."""
    q, k, v = (
        F.linear(hidden, part.weight, part.bias).unflatten(-1, (-1, head_dim))
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if qk_norm and hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if rope_base is not None:
        q, k = rotated(q, rope_base), rotated(k, rope_base)
    kv_heads = k.shape[2]
    read = []
    for h in range(heads):
        g = h // (heads // kv_heads) if pair is None else pair(h, kv_heads)
        scores = torch.einsum("btp,bsp->bts", q[:, :, h], k[:, :, g]) / math.sqrt(head_dim)
        read.append(torch.einsum("bts,bsp->btp", scores.tril(), v[:, :, g]))
    return F.linear(torch.cat(read, -1), attention.o_proj.weight, attention.o_proj.bias)


def hidden_states(teacher, seed=0):
    return torch.randn(2, LENGTH, teacher.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def layer_difference(teacher, student, layer=1, rope=False, **reference):
    """How far a mixer of the student is from linear attention with the teacher's weights, on random hidden states."""
    mixer, config = student.mixer_layers()[layer], teacher.config
    remember_everything(mixer)
    hidden = hidden_states(teacher)
    rotary = student.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    expected = linear_attention(
        teacher.model.layers[layer].self_attn,
        hidden,
        config.num_attention_heads,
        config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads,
        rope_base=config.rope_parameters["rope_theta"] if rope else None,
        **reference,
    )
    return difference(mixer(hidden, position_embeddings=rotary)[0], expected)


@pytest.mark.parametrize("kernel", [1, 4])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("case", TEACHERS)
def test_a_mixer_without_decay_is_the_teachers_attention_without_softmax(case, rope, kernel):
    teacher = teacher_of(case)
    student = build(teacher, rope=rope, conv_kernel=kernel)
    for layer in (0, 3):
        assert layer_difference(teacher, student, layer, rope=rope) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"expand_kv": True}, {"state_factor": 2}, {"expand_kv": True, "state_factor": 2}])
@pytest.mark.parametrize("case", ["4 heads over 2", "biases", "q and k norms, head_dim 32 of hidden 64"])
def test_heads_of_its_own_and_a_larger_state_change_nothing_at_the_start(case, options):
    """And from then on all of them learn."""
    teacher = teacher_of(case)
    student = build(teacher, rope=True, conv_kernel=3, **options)
    assert layer_difference(teacher, student, 0, rope=True) < 1e-5
    mixer = student.mixer_layers()[0]
    hidden = torch.randn(2, 12, student.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rotary = student.model.rotary_emb(hidden, torch.arange(12)[None])
    mixer(hidden, rotary)[0].pow(2).sum().backward()
    rows = dict(zip(mixer.sizes, mixer.in_proj.weight.grad.split(list(mixer.sizes.values())), strict=True))
    learns = rows["C"].unflatten(0, (mixer.num_heads, mixer.state_factor, -1)).abs().sum((-1, -2))
    assert (learns > 0).all()
    if "expand_kv" in options:  # each head by itself
        own = rows["x"].unflatten(0, (mixer.num_heads, -1))
        assert all(not torch.equal(own[0], other) for other in own[1:])


@pytest.mark.parametrize("case", ["4 heads over 2", "biases", "q and k norms, head_dim 32 of hidden 64"])
def test_a_gate_starts_open(case):
    teacher = teacher_of(case)
    assert layer_difference(teacher, build(teacher, gate=True, gate_bias=True)) < 1e-4


def test_q_and_k_norms_can_be_left_out():
    teacher = teacher_of("q and k norms, head_dim 32 of hidden 64")
    student = build(teacher, qk_norm=False)
    assert layer_difference(teacher, student, qk_norm=False) < 1e-5
    assert layer_difference(teacher, student, qk_norm=True) > 0.1


@pytest.mark.parametrize("case", ["4 heads over 2", "6 heads over 3", "6 heads over 2"])
def test_pairing_heads_by_remainder_would_be_far_off(case):
    teacher = teacher_of(case)
    assert layer_difference(teacher, build(teacher), pair=lambda h, kv_heads: h % kv_heads) > 0.3


@pytest.mark.parametrize("case", ["4 heads over 2", "window"])
def test_without_rope_a_mixer_differs_from_attention_with_it(case):
    teacher = teacher_of(case)
    assert layer_difference(teacher, build(teacher, rope=False), rope=True) > 0.1


class Rolled(Transfer):
    """A transfer that gets the heads in the wrong order."""

    def compute(self, teacher, like):
        return super().compute(teacher, like).roll(16, 0)


class Unscaled(Transfer):
    def compute(self, teacher, like):
        return super().compute(teacher, like) / self.value


def mutated(plan, part, change):
    """The plan, with one part of in_proj changed."""
    transfers = [change(t) if t.target.endswith("in_proj.weight") and t.part == part else t for t in plan.transfers]
    assert transfers != plan.transfers
    return replace(plan, transfers=transfers)


def as_class(cls):
    return lambda t: cls(t.target, t.operation, t.source, t.rows, t.part, t.value)


@pytest.mark.parametrize(
    "part, change",
    [
        ("x", as_class(Rolled)),
        ("B", as_class(Rolled)),
        ("C", as_class(Rolled)),
        ("C", as_class(Unscaled)),
        ("B", lambda t: replace(t, source=t.source.replace("k_proj", "v_proj"))),
        ("x", lambda t: replace(t, source=t.source.replace("layers.1", "layers.2"))),
    ],
    ids=["x rolled", "B rolled", "C rolled", "C unscaled", "B from v_proj", "x from another layer"],
)
def test_a_plan_with_one_mistake_would_be_far_off(part, change):
    teacher = teacher_of("4 heads over 2")
    student = build(teacher)
    assert layer_difference(teacher, student) < 1e-5
    mutated(student.transfer_plan, part, change).execute(teacher, student)
    assert layer_difference(teacher, student) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("case", ["biases", "4 heads over 2"])
def test_with_silu_the_convolution_hands_it_the_teachers_projections_times_its_tap(case):
    teacher = teacher_of(case)
    student = build(teacher, conv_activation="silu")
    mixer, attention = student.mixer_layers()[1], teacher.model.layers[1].self_attn
    hidden = hidden_states(teacher)
    start = mixer.sizes["z"]
    channels = mixer.conv1d.weight.shape[0]
    given = mixer.in_proj(hidden)[..., start : start + channels] * mixer.conv1d.weight[:, 0, -1] + mixer.conv1d.bias
    x, B, C = given.split([mixer.sizes[part] for part in "xBC"], -1)
    taps = mixer.conv1d.weight[:, 0, -1].split([mixer.sizes[part] for part in "xBC"])
    for found, tap, projection, scale in (
        (x, taps[0], attention.v_proj, 1),
        (B, taps[1], attention.k_proj, 1),
        (C, taps[2], attention.q_proj, attention.head_dim**-0.5),
    ):
        assert tap.unique().numel() == 1 and 0 < tap[0] <= 1
        torch.testing.assert_close(found, projection(hidden) * scale * tap[0], rtol=1e-4, atol=1e-6)
    assert torch.count_nonzero(mixer.conv1d.weight[..., :-1]) == 0


def test_a_student_starts_with_no_skip_an_open_gate_and_a_half_life_of_32_tokens():
    mixer = build(teacher_of("4 heads over 2"), gate=True, gate_bias=True, norm=True).mixer_layers()[0]
    assert torch.equal(mixer.D, torch.zeros(4)) and torch.equal(mixer.norm.weight, torch.ones(64))
    torch.testing.assert_close(F.silu(mixer.z_bias), torch.ones(64))
    decay = torch.exp(-torch.exp(mixer.A_log) * F.softplus(mixer.dt_bias))
    torch.testing.assert_close(decay**32, torch.full((4,), 0.5))
    dt_and_z = torch.cat((mixer.in_proj.weight[:64], mixer.in_proj.weight[-4:]))
    assert torch.count_nonzero(dt_and_z) == 0


@pytest.mark.parametrize("case", ["4 heads over 2", "untied", "biases", "q and k norms, head_dim 32 of hidden 64"])
@pytest.mark.parametrize("keep", [[], [1]])
def test_what_is_not_planned_is_the_teachers_own_and_shares_no_memory_with_it(case, keep):
    teacher = teacher_of(case)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = build(teacher, keep_attention=keep, gate=True, norm=True)

    planned = {transfer.target for transfer in student.transfer_plan.transfers}
    own = {name: tensor for name, tensor in student.named_parameters() if name not in planned}
    source = dict(teacher.named_parameters())
    assert len(own) == student.transfer_plan.kept and all(torch.equal(own[name], source[name]) for name in own)
    assert {name.removeprefix("model.layers.1.") for name in own if "layers.1." in name} >= {
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    assert ("model.layers.1.self_attn.q_proj.weight" in own) == (keep == [1])
    buffers = dict(teacher.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in student.named_buffers())

    def memory(model):
        tensors = [*model.parameters(), *model.buffers()]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    assert not memory(student) & memory(teacher)
    assert student.config is not teacher.config and student.generation_config is not teacher.generation_config
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7)
    student.config.rms_norm_eps, student.generation_config.max_new_tokens = 9.0, 9
    after = teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert teacher.config.model_type == TEACHERS[case][0] and teacher.config.rms_norm_eps != 9
    assert teacher.generation_config.max_new_tokens != 9


@pytest.mark.parametrize("case, tied", [("4 heads over 2", True), ("untied", False)])
def test_embeddings_stay_tied_or_untied(case, tied):
    teacher = teacher_of(case)
    student = build(teacher)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


@torch.no_grad()
def test_a_kept_layer_computes_what_the_teachers_does():
    teacher = teacher_of("window")
    student = build(teacher, keep_attention=[0])
    ids = torch.arange(LENGTH)[None] % 200
    first = [model(ids, output_hidden_states=True).hidden_states[1] for model in (teacher, student)]
    assert torch.equal(*first)
    assert not torch.allclose(*(model(ids).logits for model in (teacher, student)))


def test_a_tensor_of_the_teacher_without_a_place_in_the_student_is_named():
    teacher = teacher_of("biases")
    teacher.model.layers[1].mlp.register_parameter("gain", nn.Parameter(torch.ones(1)))
    with pytest.raises(StudentError, match="no place for the teacher's model.layers.1.mlp.gain"):
        build(teacher)
    with pytest.raises(StudentError, match="no place for the teacher's model.layers.1.mlp.gain"):
        build_student(teacher, StudentConfig(mixer="transmamba"))


def test_a_model_that_is_more_than_a_language_model_is_refused():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"model_type": "qwen2", "vocab_size": 99, "intermediate_size": 64, "num_key_value_heads": 2}
    config = AutoConfig.for_model("got_ocr2", text_config=text, vision_config=sizes | {"image_size": 32})
    with pytest.raises(StudentError, match="GotOcr2ForConditionalGeneration: it is more than a language model"):
        build(AutoModelForCausalLM.from_config(config))


IMPOSSIBLE = [
    {"cache_implementation": "static", "max_cache_len": 64},
    {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    {"is_assistant": True, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.4},
    {"dola_layers": "high"},
]
UNSAVED = [
    {"temperature": 0.9, "top_p": 0.6},
    {"top_k": 20, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"num_return_sequences": 3},
    {"length_penalty": 2.0, "early_stopping": True},
]


@pytest.mark.parametrize("settings", IMPOSSIBLE + UNSAVED)
@pytest.mark.parametrize("options", [{}, {"mixer": "transmamba", "trans_points": 4}])
def test_what_a_teacher_asks_of_generation_and_no_hybrid_can_do_is_left_out(settings, options, tmp_path):
    teacher = teacher_of("4 heads over 2")
    vars(teacher.generation_config).update(settings)  # unchecked, as a file is read
    student = build_student(teacher, StudentConfig(**options))
    ids = torch.arange(3, 13)[None]
    greedy = student.generate(ids, max_new_tokens=4, do_sample=False)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False), greedy)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded.generation_config, field) == getattr(teacher.generation_config, field)


def test_what_a_teacher_asks_of_generation_and_a_hybrid_can_do_is_kept():
    teacher = teacher_of("4 heads over 2")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 5}
    teacher.generation_config.update(**settings)
    kept = build(teacher).generation_config.to_dict()
    assert {name: kept[name] for name in settings} == settings


def test_a_student_follows_its_teachers_mode_dtype_and_generation_config():
    teacher = teacher_of("4 heads over 2")
    teacher.generation_config.max_new_tokens = 7
    assert build(teacher).generation_config.max_new_tokens == 7
    assert not build(teacher).training and build(teacher.train()).training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_step_and_skip_stay_float32_in_a_half_precision_student(dtype):
    student = build(teacher_of("biases", dtype), gate=True, norm=True)
    exact = {"A_log", "dt_bias", "D"}
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if name.split(".")[-1] in exact else dtype), name
    assert student.dtype == dtype
    with torch.no_grad():
        logits = student(torch.arange(LENGTH)[None]).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    torch.testing.assert_close(student.mixer_layers()[0].dt_bias, torch.full((4,), math.log(math.e - 1)))


def family_teacher(family, **fields):
    sizes = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **fields)).eval()


@pytest.mark.parametrize("family, fields", [("mixtral", {"num_local_experts": 4}), ("granite", {})])
def test_families_without_a_file_of_their_own_are_converted_experts_included(family, fields):
    teacher = family_teacher(family, **fields)
    student = build(teacher, keep_attention=[1])
    assert [mixer is None for mixer in student.mixer_layers()] == [False, True, False, False]
    experts = {name for name, _ in teacher.named_parameters() if "mlp" in name or "experts" in name}
    assert experts <= {name for name, _ in student.named_parameters()}
    with torch.no_grad():
        ids = torch.arange(3, 30)[None]
        first = student.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(
            first, student.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
        )


def test_a_scale_of_the_teachers_own_is_carried():
    """Granite scales its scores by a number from its config, not by 1/sqrt(P)."""
    teacher = family_teacher("granite", attention_multiplier=0.4)
    student = build(teacher)
    mixer, attention = student.mixer_layers()[1], teacher.model.layers[1].self_attn
    torch.testing.assert_close(mixer.in_proj.weight[64:128], attention.q_proj.weight * 0.4)


@pytest.mark.parametrize(
    "case", ["4 heads over 2", "biases", "biases, o too", "q and k norms, head_dim 32 of hidden 64"]
)
@pytest.mark.parametrize("gate", [False, True])
def test_the_plan_fills_every_row_of_every_mixer_parameter_once(case, gate):
    teacher = teacher_of(case)
    student = build(teacher, keep_attention=[1], gate=gate, norm=True)
    parameters = dict(student.named_parameters())
    filled = {}
    for transfer in student.transfer_plan.transfers:
        size = parameters[transfer.target].shape[0]
        filled.setdefault(transfer.target, []).append(transfer.rows or (0, size))
    for target, rows in filled.items():
        rows.sort()
        assert rows[0][0] == 0 and rows[-1][1] == parameters[target].shape[0], target
        assert all(end == start for (_, end), (start, _) in zip(rows, rows[1:], strict=False)), target
    mixers = {name for name in parameters if "self_attn" in name and "layers.1." not in name}
    norms = {name for name in mixers if name.endswith(("q_norm.weight", "k_norm.weight"))}
    assert set(filled) == mixers - norms and len(norms) == (6 if "norms" in case else 0)


@pytest.mark.parametrize("case", ["biases", "4 heads over 2", "q and k norms, head_dim 32 of hidden 64"])
def test_a_plan_prints_each_transfer_with_rows_operation_and_source(case):
    teacher = teacher_of(case)
    student, plan = plan_student(teacher, StudentConfig(keep_attention=[1]))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(plan).splitlines() if "│" in line]
    for transfer in plan.transfers:
        rows = "all" if transfer.rows is None else f"{transfer.rows[0]}:{transfer.rows[1]}"
        found = [line for line in lines if line[0] == transfer.target and line[1] == f"{rows} {transfer.part}".strip()]
        assert len(found) == 1 and found[0][2] == transfer.operation, transfer
        assert (transfer.source or "") in found[0][3]
    assert len(lines) == len(plan.transfers) + 1 + (lines[0][0] == "student tensor")
    assert lines[-1] == [f"{plan.kept} further tensors", "all", "copy", "the same name"]
    # Scaled where nothing norms it afterwards.
    sources = {line[1].split()[-1]: line[2:] for line in lines if line[0] == "model.layers.0.self_attn.in_proj.weight"}
    q_proj = ["copy", "{}q_proj.weight"] if "norms" in case else ["scale", "{}q_proj.weight * 0.25"]
    expected = {"x": ["copy", "{}v_proj.weight"], "B": ["copy", "{}k_proj.weight"], "C": q_proj}
    for part, cells in expected.items():
        assert sources[part] == [cell.format("model.layers.0.self_attn.") for cell in cells]
    assert sources["z"] == sources["dt"] == ["constant", "0"]
    assert "model.layers.1.self_attn" not in str(plan)


def test_planning_reads_and_makes_no_weights():
    teacher = teacher_of("4 heads over 2")
    student, plan = plan_student(teacher, StudentConfig())
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert plan == transfer_plan(teacher, student) == build_student(teacher, StudentConfig()).transfer_plan


def test_windows_that_mixers_give_up_are_known():
    student, _ = plan_student(teacher_of("window"), StudentConfig(keep_attention=[1]))
    assert student.windows_given_up == [0, 2, 3]
    student, _ = plan_student(teacher_of("4 heads over 2"), StudentConfig(keep_attention=[1]))
    assert student.windows_given_up == []


def test_a_plan_is_not_executed_on_another_teacher():
    student = build(teacher_of("biases"))
    plan = student.transfer_plan
    with pytest.raises(
        StudentError, match=r"conv1d.bias needs model.layers.0.self_attn.v_proj.bias, which the teacher"
    ):
        plan.execute(teacher_of("4 heads over 2"), student)
    wide, _ = random_teacher("random-qwen2", hidden_size=96, intermediate_size=128)
    with pytest.raises(StudentError, match=r"model.embed_tokens.weight has no counterpart in the teacher and is not"):
        plan.execute(wide, student)
    one_key, _ = random_teacher("random-qwen2", num_key_value_heads=1)
    with pytest.raises(StudentError, match=r"v_proj.weight is \(16, 64\), .*in_proj.weight needs \(32, 64\)"):
        plan.execute(one_key, student)


def test_a_plan_that_forgets_or_invents_a_tensor_is_not_executed():
    teacher = teacher_of("4 heads over 2")
    student = build(teacher)
    plan = student.transfer_plan
    forgetful = replace(plan, transfers=[t for t in plan.transfers if t.target != "model.layers.2.self_attn.D"])
    with pytest.raises(StudentError, match="the student's model.layers.2.self_attn.D has no counterpart"):
        forgetful.execute(teacher, student)
    inventive = replace(plan, transfers=[*plan.transfers, Transfer("model.extra", "constant", value=0.0)])
    with pytest.raises(StudentError, match="the plan fills model.extra, which the student does not have"):
        inventive.execute(teacher, student)


def test_a_teacher_that_is_not_understood_is_refused_before_anything_is_built():
    teacher = teacher_of("4 heads over 2")
    teacher.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(TeacherError, match=r"model.layers.2.self_attn \(LlamaAttention\) is not understood"):
        build_student(teacher, StudentConfig())


# Going on from another student


@torch.no_grad()
def stirred(model):
    """The same model with other weights."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mixer", ["mamba2", "window_mamba2"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_student_goes_on_from_another(family, mixer):
    teacher = random_teacher(f"random-{family}", 3)[0]
    start = stirred(build_student(teacher, StudentConfig(mixer=mixer, keep_attention=[0, 2, 3])))
    same = build_student(teacher, StudentConfig(mixer=mixer, keep_attention=[0, 2, 3]), start)
    ids = torch.arange(24)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(same(ids).logits, start(ids).logits, rtol=0, atol=0)
    further = build_student(teacher, StudentConfig(mixer=mixer, keep_attention=[2, 3]), start)
    # What becomes a mixer now is made of the attention that the student has, not of the teacher's.
    own = dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name in own and own[name].shape == parameter.shape:
                parameter.copy_(own[name])
    wanted = dict(build_student(teacher, StudentConfig(mixer=mixer, keep_attention=[2, 3])).named_parameters())
    for name, parameter in further.named_parameters():
        torch.testing.assert_close(parameter, (own if ".layers.1." in name else wanted)[name], rtol=0, atol=0)
    assert len(further.transfer_plan.transfers) == len(start.transfer_plan.transfers)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"keep_attention": [1]}, "layer 0 is to be window_mamba2, and is mamba2 in the student to start from"),
        ({"keep_attention": [0], "mixer": "mamba2"}, "layer 0 keeps attention, and is mamba2 in the student"),
        ({"keep_attention": [1], "mixer": "mamba2", "rope": True}, "student.rope is True, and False in the student"),
    ],
)
def test_what_a_student_cannot_go_on_to_is_refused(options, told):
    teacher = random_teacher("random-llama", 2)[0]
    start = build_student(teacher, StudentConfig(keep_attention=[1]))
    with pytest.raises(StudentError, match=told):
        build_student(teacher, StudentConfig(**{"mixer": "window_mamba2", **options}), start)


def test_a_student_of_another_teacher_is_refused():
    start = build_student(random_teacher("random-llama", 2)[0], StudentConfig(keep_attention=[1]))
    for teacher, told in (
        (random_teacher("random-llama", num_hidden_layers=3)[0], "num_hidden_layers"),
        (random_teacher("random-qwen2", 2)[0], "base_model_type"),
    ):
        with pytest.raises(StudentError, match=f"not one of this teacher: its {told} is another"):
            build_student(teacher, StudentConfig(keep_attention=[]), start)


def test_a_student_leaves_nothing_to_chance_where_its_teacher_s_training_did():
    """Seed-OSS is released with dropout, which a student in training would have, and its mixers and exports not."""
    dropout = {"attention_dropout": 0.1, "residual_dropout": 0.1}
    teacher, _ = random_teacher("random-llama", model_type="seed_oss", **dropout)
    student = build_student(teacher, StudentConfig(keep_attention=[1])).train()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(student(ids).logits, student(ids).logits)
    assert student.config.attention_dropout == student.config.residual_dropout == 0
