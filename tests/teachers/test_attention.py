"""attention_view: what it says of each family, that it computes what the modules compute, and what it refuses."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from transpoint.teachers import TeacherError, attention_view
from transpoint.teachers.random import RANDOM_FAMILIES, random_teacher

LENGTH = 24  # longer than the windows below

# Family, fields of its config, and what the view of a layer then says.
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TYPES = ["sliding_attention", "full_attention"] * 2
WINDOWS = [16, None] * 2
FAMILIES = {
    "llama": ("llama", {}, {}),
    "llama with biases": ("llama", {"attention_bias": True}, {"biases": ("k_proj", "o_proj", "q_proj", "v_proj")}),
    "llama, three queries a key": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
        {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "scale": 8**-0.5, "rotary_dim": 8},
    ),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    "llama, as many keys as queries": ("llama", {"num_key_value_heads": 4}, {"num_kv_heads": 4}),
    "mistral": ("mistral", {}, {"window": 16}),
    "qwen2": ("qwen2", {}, {"biases": ("k_proj", "q_proj", "v_proj")}),
    "qwen3": ("qwen3", {}, {"head_dim": 32, "scale": 32**-0.5, "rotary_dim": 32, "normed": True}),
    "smollm3, no rotary in every fourth layer": ("smollm3", {}, {"rotary_dim": [16, 16, 16, 0]}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),
    "granite": ("granite", {"attention_multiplier": 0.4}, {"scale": 0.4}),
    "mixtral": ("mixtral", {"num_local_experts": 2}, {}),
    "phi3, in one matrix": ("phi3", {"rope_parameters": PARTIAL}, {"rotary_dim": 8}),
    "gpt_neox, head by head": (
        "gpt_neox",
        {"rope_parameters": PARTIAL},
        {"num_kv_heads": 4, "rotary_dim": 8, "biases": ("k_proj", "o_proj", "q_proj", "v_proj")},
    ),
    "olmo2, norms over all heads": ("olmo2", {}, {"normed": True, "norm_over": "all"}),
    "olmo3": (
        "olmo3",
        {"layer_types": TYPES, "sliding_window": 16},
        {"normed": True, "norm_over": "all", "window": WINDOWS},
    ),
    "gemma3, a rotary for each type": (
        "gemma3_text",
        {"layer_types": TYPES, "sliding_window": 16, "query_pre_attn_scalar": 16},
        {"normed": True, "norm_over": "head", "window": WINDOWS, "layer_type": TYPES},
    ),
}


def teacher(family, **fields):
    """A tiny random model of any family transformers has."""
    if family in RANDOM_FAMILIES:
        return random_teacher(f"random-{family}", 1, **fields)[0]
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
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **fields})).eval()


def attention_calls(model):
    """For each layer, what its attention was given and gave, in a forward pass over real tokens."""
    calls = []

    def record(module, args, kwargs, output):
        calls.append((args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

    hooks = [view.module.register_forward_hook(record, with_kwargs=True) for view in attention_view(model)]
    ids = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", FAMILIES)
def test_a_view_says_what_the_attention_is(case):
    family, fields, expected = FAMILIES[case]
    expected = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "scale": 0.25,
        "rotary_dim": 16,
        "window": None,
        "biases": (),
        "hidden_size": 64,
    } | expected
    normed = expected.pop("normed", False)
    model = teacher(family, **fields)
    views = attention_view(model)
    assert len(views) == 4
    for index, view in enumerate(views):
        of_layer = {name: value[index] if isinstance(value, list) else value for name, value in expected.items()}
        assert {name: getattr(view, name) for name in expected} == of_layer
        assert view.layer == index and view.name == f"{model.base_model_prefix}.layers.{index}.{view.attribute}"
        assert view.module is model.get_submodule(view.name) and view.q_proj.linear is getattr(
            view.module, view.q_proj.name
        )
        assert (view.q_norm is not None, view.k_norm is not None) == (normed, normed)
        if normed:
            assert view.q_norm is view.module.q_norm and view.k_norm is view.module.k_norm


@pytest.mark.parametrize("case", FAMILIES)
def test_a_view_computes_what_the_module_computes_in_a_forward_pass(case):
    family, fields, _ = FAMILIES[case]
    model = teacher(family, **fields)
    for view, (hidden, rotary, expected) in zip(attention_view(model), attention_calls(model), strict=True):
        with torch.no_grad():
            q, k, v = view.project(hidden, rotary)
            read = view.attend(view.weights(q, k), v)
            assert q.shape == read.shape == (2, LENGTH, view.num_heads, view.head_dim)
            assert k.shape == v.shape == (2, LENGTH, view.num_kv_heads, view.head_dim)
            assert difference(view.o_proj(read.flatten(2)), expected) < 1e-5


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 2), (6, 3), (4, 1), (4, 4)])
def test_query_head_h_reads_key_and_value_head_h_over_group(heads, kv_heads):
    model = teacher("llama", hidden_size=96, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    view = attention_view(model)[0]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 5, heads, 8, generator=generator)
    k, v = torch.randn(2, 1, 5, kv_heads, 8, generator=generator)
    weights = view.weights(q, k)
    read = view.attend(weights, v)
    for h in range(heads):
        pair = h // (heads // kv_heads)
        scores = (q[0, :, h] @ k[0, :, pair].T * 8**-0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(weights[0, h], scores.softmax(-1))
        torch.testing.assert_close(read[0, :, h], scores.softmax(-1) @ v[0, :, pair])


def test_attention_weights_are_causal_float32_and_sum_to_one():
    view = attention_view(teacher("mistral").to(torch.bfloat16))[0]
    q, k = torch.randn(1, LENGTH, 4, 16).bfloat16(), torch.randn(1, LENGTH, 2, 16).bfloat16()
    weights = view.weights(q, k)
    t = torch.arange(LENGTH)
    seen = (t[:, None] >= t) & (t[:, None] - t < 16)
    assert weights.dtype == torch.float32
    assert torch.equal(weights > 0, seen.expand(1, 4, -1, -1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, LENGTH))
    assert torch.equal(view.unseen(LENGTH, "cpu"), ~seen)


@pytest.mark.parametrize(
    "family, fields, windows",
    [
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"sliding_window": 8}, [None] * 4),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 8, 8]),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 8]),
        ("qwen2_moe", {"num_experts": 2, "num_experts_per_tok": 1}, [None] * 4),  # its config then says 0
        # Its modules have the field in sliding layers alone.
        (
            "qwen2_moe",
            {"num_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "use_sliding_window": True},
            [8, None, 8, None],
        ),
    ],
)
def test_only_layers_that_slide_have_a_window(family, fields, windows):
    model = teacher(family, **fields)
    views = attention_view(model)
    assert [view.window for view in views] == windows
    for view, (hidden, rotary, expected) in zip(views, attention_calls(model), strict=True):
        with torch.no_grad():
            q, k, v = view.project(hidden, rotary)
            assert difference(view.o_proj(view.attend(view.weights(q, k), v).flatten(2)), expected) < 1e-5


def test_a_model_without_weights_is_viewed_and_not_computed():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(teacher("qwen3").config)
    for view, expected in zip(attention_view(model), attention_view(teacher("qwen3")), strict=True):
        assert view.q_proj.weight.device.type == "meta"
        for name in ("name", "num_heads", "num_kv_heads", "head_dim", "scale", "rotary_dim", "window", "biases"):
            assert getattr(view, name) == getattr(expected, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_teachers_pass_the_numeric_check(dtype):
    assert len(attention_view(teacher("qwen3").to(dtype))) == 4


def with_part(name, part, **more):
    """A llama whose layer 2 has one more part in its attention, or several."""
    model = teacher("llama")
    for key, value in {name: part, **more}.items():
        setattr(model.model.layers[2].self_attn, key, value)
    return model


def without_part(family, name):
    model = teacher(family)
    delattr(model.model.layers[2].self_attn, name)
    return model


def computing(change):
    """A llama whose layer 2 computes something else with the same parts."""
    model = teacher("llama")
    module = model.model.layers[2].self_attn
    forward = module.forward
    module.forward = lambda **kwargs: change(forward, **kwargs)
    return model


def unrotated(forward, hidden_states, position_embeddings, **kwargs):
    cos, sin = position_embeddings
    return forward(hidden_states=hidden_states, position_embeddings=(cos**0, 0 * sin), **kwargs)


def of_shape(part, features):
    model = teacher("llama")
    setattr(model.model.layers[2].self_attn, part, nn.Linear(64, features, bias=False))
    return model


REFUSED = {
    "GPT-2": (
        lambda: teacher("gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=64),
        "GPT2LMHeadModel is not understood: its decoder has no list `layers`",
    ),
    "a layer without self_attn": (
        lambda: teacher("jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, num_experts=2),
        "layer 0 (JambaMambaDecoderLayer) is not understood: it has no `self_attn` or `attention`",
    ),
    "Persimmon, q, k and v in one": (
        lambda: teacher("persimmon"),
        "model.layers.0.self_attn (PersimmonAttention) is not understood: it lacks k_proj, o_proj, q_proj, v_proj and "
        "has dense, k_layernorm, q_layernorm, query_key_value",
    ),
    "norms over half of a head": (
        lambda: with_part("q_norm", nn.RMSNorm(8), k_norm=nn.RMSNorm(8)),
        "model.layers.2.self_attn (LlamaAttention) is not understood: q_norm is over (8,), neither over one head of "
        "16 nor over all",
    ),
    "norms of two kinds": (
        lambda: with_part("q_norm", nn.RMSNorm(64), k_norm=nn.RMSNorm(16)),
        "model.layers.2.self_attn (LlamaAttention) is not understood: k_norm is over (16,), neither over one head of "
        "16 nor over all",
    ),
    "gpt-oss, sinks": (
        lambda: teacher("gpt_oss", num_local_experts=2, num_experts_per_tok=1),
        "model.layers.0.self_attn (GptOssAttention) is not understood: no place for its sinks",
    ),
    "a parameter more": (
        lambda: with_part("sinks", nn.Parameter(torch.zeros(4))),
        "model.layers.2.self_attn (LlamaAttention) is not understood: no place for its sinks",
    ),
    "a module more": (
        lambda: with_part("gate_proj", nn.Linear(64, 64)),
        "model.layers.2.self_attn (LlamaAttention) is not understood: no place for its gate_proj",
    ),
    "one norm of two": (
        lambda: with_part("q_norm", nn.RMSNorm(16)),
        "model.layers.2.self_attn (LlamaAttention) is not understood: it has one of q_norm and k_norm, not both",
    ),
    "no scale": (
        lambda: without_part("llama", "scaling"),
        "model.layers.2.self_attn (LlamaAttention) is not understood: it does not state head_dim and scaling",
    ),
    "heads that do not fit": (
        lambda: of_shape("k_proj", 48),
        "model.layers.2.self_attn (LlamaAttention) is not understood: shapes q 64, k 48, v 32, o 64 do not make heads "
        "of 16",
    ),
    "Gemma-2, capped scores": (
        lambda: teacher("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=50.0),
        "model.layers.0.self_attn (Gemma2Attention) is not understood: it caps its scores (attn_logit_softcapping 50)",
    ),
}

# Same parts, other arithmetic: only the numeric check can tell.
MISCOMPUTED = {
    "GLM-4, interleaved rotary": (lambda: teacher("glm4"), "model.layers.0.self_attn"),
    "one layer unrotated": (lambda: computing(unrotated), "model.layers.2.self_attn"),
    "one layer scaled": (
        lambda: computing(lambda forward, **kwargs: (1.001 * forward(**kwargs)[0], None)),
        "model.layers.2.self_attn",
    ),
    "one layer in nan": (
        lambda: computing(lambda forward, **kwargs: (torch.nan * forward(**kwargs)[0], None)),
        "model.layers.2.self_attn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_with_other_parts_is_refused_naming_the_layer_and_the_part(case):
    model, message = REFUSED[case]
    with pytest.raises(TeacherError) as caught:
        attention_view(model())
    assert str(caught.value) == message


@pytest.mark.parametrize("case", MISCOMPUTED)
def test_attention_that_computes_something_else_is_refused_naming_the_layer(case):
    model, layer = MISCOMPUTED[case]
    with pytest.raises(TeacherError) as caught:
        attention_view(model())
    assert str(caught.value).startswith(f"{layer} (") and "it computes something else than attention" in str(
        caught.value
    )


def test_gemma2_without_a_cap_is_understood():
    views = attention_view(teacher("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=None, sliding_window=8))
    assert [view.window for view in views] == [8, None, 8, None]
