"""`gguf`: one file for llama.cpp, of its architecture `granitehybrid`.

It is the native form once more, with three differences: llama.cpp's Mamba-2 projections have no biases, its inner width
is twice the hidden size, and its rotary embedding turns neighbours. Zero heads make up for the width, and change
nothing.
"""

import copy
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRotaryEmbedding

from ...students import HybridForCausalLM, StudentConfig
from ..models import generated, generating, load_tokenizer
from ..run.files import read_json, write_json
from ..tokenizers import PROBES
from . import granite
from .engines import READ, TRIED, Engine
from .formats import ExportError, Format
from .home import FOR_CONFIG, FOR_STUDENT, has_positions
from .verify import TOLERANCE, as_written, rounded

FILE = "model.gguf"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = (
    "The town lies where two rivers meet, and for a long time that was all there was to say about it. Then came the "
    "railway, and with it people who wanted to build mills, schools and a market hall."
)
PROMPTS = (1, 7, 40, 200)  # random tokens of each
STEPS = 12  # of greedy decoding after each, and after the question
TEXT_STEPS = (8, 24)  # tokens of the text that come at once, and then one by one
MOST_LIKELY = 1000  # tokens of each step whose log-probabilities are compared
ROPES = ("default", "linear", "llama3", "yarn")  # rotary embeddings that are the same whatever the length
# Nats of KL, of weights in fewer bits, with which llama.cpp computes in as few: some ten times what eight bits cost a
# hybrid of SmolLM2-135M. Single log-probabilities say nothing: one token may make much of the rounding of another.
WORST = 0.2
_TYPES: dict[torch.dtype | str, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_OWN_ATTENTION = "its attention is the teacher's, positions included"
_NO_BIAS = "its Mamba-2 layer has no bias in the gate"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# llama.cpp's names of ways to split text before byte-level merges, by the regular expression in tokenizer.json.
_SPLITS = {
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


def why_no_student(config: StudentConfig) -> str | None:
    if reason := granite.why_no_student(config) or _no_llama_cpp():
        return reason
    if config.attention_options is not None:
        return f"{_OWN_ATTENTION}; {FOR_CONFIG}"
    if config.mixer_options["gate_bias"]:
        return f"{_NO_BIAS}; set student.gate_bias=false, or use export.format=custom"
    return None


def why_not(student: HybridForCausalLM) -> str | None:
    if reason := granite.why_not(student) or _no_llama_cpp():
        return reason
    config, mixers = student.config, granite.mixers_of(student)
    attention: list[Any] = [layer for layer in student.attention_layers() if layer not in mixers]
    if len(mixers) + config.mixers.count("attention") < len(config.mixers) or not all(map(has_positions, attention)):
        return f"{_OWN_ATTENTION}; {FOR_STUDENT}"
    mixer = mixers[0]
    width = mixer.num_heads * mixer.head_dim
    if any(mixer.z_bias is not None for mixer in mixers):
        return (
            f"{_NO_BIAS}; make the student with student.gate_bias=false (transpoint run RUN/recipe.yaml "
            "student.gate_bias=false trains it anew), or use format custom"
        )
    if any(mixer.out_proj.bias is not None for mixer in mixers):
        return "its Mamba-2 layer has no bias in the output projection; use format custom"
    if width > 2 * config.hidden_size or 2 * config.hidden_size % mixer.head_dim:
        return (
            f"its Mamba-2 layer is as wide as two hidden states of {config.hidden_size}, into which "
            f"{mixer.num_heads} heads of {mixer.head_dim} do not go; use format custom"
        )
    if width != config.hidden_size and any(layer.q_proj.bias is not None for layer in attention):
        return "its attention has biases only where all heads are as wide as a hidden state; use format custom"
    if (kind := config.rope_parameters.get("rope_type", "default")) not in ROPES:
        return f"its rotary embedding is not scaled as here ({kind}); use format custom"
    return None


def _why_not_q8_0(student: HybridForCausalLM) -> str | None:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    if student.config.hidden_size % block == 0:
        return None
    return (
        f"q8_0 takes {block} weights of a row together, into which a hidden state of {student.config.hidden_size} "
        "does not go; use dtype float16"
    )


def _no_llama_cpp() -> str | None:
    if importlib.util.find_spec("xllamacpp") is not None:
        return None
    return "what is written is checked in llama.cpp, which is not installed: pip install 'transpoint[gguf]'"


def write(student: HybridForCausalLM, folder: Path, dtype: torch.dtype | str) -> None:
    _write_student(folder / FILE, student, _before_quantising(dtype), load_tokenizer(folder), dtype)


def _before_quantising(dtype: torch.dtype | str) -> torch.dtype:
    return torch.float32 if isinstance(dtype, str) else dtype


def _write_student(
    path: Path,
    student: HybridForCausalLM,
    rounding: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | str,
) -> None:
    state = rounded(student, rounding, granite.state_of(student))
    _write_file(path, granite.config_of(student), state, tokenizer, dtype)


def _write_file(
    path: Path,
    config: GraniteMoeHybridConfig,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | str,
) -> None:
    """Writes the weights of a GraniteMoeHybrid without biases in its Mamba-2 layers.

    Norms, convolutions and what else is small stay in float32; rows that do not go into blocks are in float16.
    """
    c = cast(Any, config)
    heads = 2 * c.hidden_size // c.mamba_d_head
    # Backends other than the CPU's want a state of 128 or 256.
    size = next((size for size in (128, 256) if c.mamba_d_state <= size), c.mamba_d_state)
    attends = [kind == "full_attention" for kind in c.layer_types]
    writer = gguf.GGUFWriter(path, "granitehybrid")
    kind, file_type = _TYPES[dtype]
    writer.add_file_type(file_type)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_vocab_size(c.vocab_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    if c.num_local_experts:
        writer.add_expert_count(c.num_local_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(c.shared_intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv([c.num_key_value_heads if attention else 0 for attention in attends])
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_scaling_finetuned(True)  # of this architecture: whether there is a rotary embedding
    frequencies, magnitude = _rotary(config)
    writer.add_rope_scaling_attn_factors(magnitude)
    writer.add_attention_scale(c.attention_multiplier)
    writer.add_embedding_scale(c.embedding_multiplier)
    writer.add_residual_scale(c.residual_multiplier)
    writer.add_logit_scale(c.logits_scaling)
    writer.add_ssm_conv_kernel(c.mamba_d_conv)
    writer.add_ssm_inner_size(2 * c.hidden_size)
    writer.add_ssm_state_size(size)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(heads)
    _add_vocabulary(writer, tokenizer, c.vocab_size)

    def add(name: str, tensor: Tensor, exact: bool = False) -> None:
        array = tensor.float().contiguous().numpy()
        exact = exact or array.ndim < 2
        raw = gguf.GGMLQuantizationType.F32 if exact else kind
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[raw][0]:
            raw = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(array, raw), raw_dtype=raw)

    def padded(tensor: Tensor, parts: str) -> Tensor:
        """Heads of rows, part by part, with zero heads behind, and zeros behind each head of B and C."""
        given = {"z": c.mamba_d_head, "x": c.mamba_d_head, "B": c.mamba_d_state, "C": c.mamba_d_state, "d": 1}
        found = []
        for part, rows in zip(parts, tensor.split([c.mamba_n_heads * given[part] for part in parts]), strict=True):
            rows = rows.unflatten(0, (c.mamba_n_heads, -1))
            whole = rows.new_zeros(heads, size if part in "BC" else given[part], *rows.shape[2:])
            whole[: c.mamba_n_heads, : given[part]] = rows
            found.append(whole.flatten(0, 1))
        return torch.cat(found)

    def turned(tensor: Tensor) -> Tensor:
        """Rows of queries or keys in which the two halves of a head alternate."""
        return tensor.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def add_mlp(layer: int, kind: str, inwards: Tensor, down: Tensor) -> None:
        for name, tensor in zip(("gate", "up", "down"), (*inwards.chunk(2, -2), down), strict=True):
            add(f"blk.{layer}.ffn_{name}{kind}.weight", tensor)

    if frequencies is not None:
        add("rope_freqs.weight", frequencies)
    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not c.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    for i, attention in enumerate(attends):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        add(f"blk.{i}.attn_norm.weight", own["input_layernorm.weight"])
        add(f"blk.{i}.ffn_norm.weight", own["post_attention_layernorm.weight"])
        shared = "_shexp" if c.num_local_experts else ""
        add_mlp(i, shared, own["shared_mlp.input_linear.weight"], own["shared_mlp.output_linear.weight"])
        if c.num_local_experts:
            add(f"blk.{i}.ffn_gate_inp.weight", own["block_sparse_moe.router.weight"], exact=True)
            add_mlp(i, "_exps", *(own[f"block_sparse_moe.experts.{name}_proj"] for name in ("gate_up", "down")))
        if attention:
            for name, short in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
                for parameter in ("weight", "bias"):
                    if (tensor := own.get(f"self_attn.{name}_proj.{parameter}")) is not None:
                        add(f"blk.{i}.attn_{short}.{parameter}", turned(tensor) if name in "qk" else tensor)
            continue
        add(f"blk.{i}.ssm_in.weight", padded(own["mamba.in_proj.weight"], "zxBCd"))
        add(f"blk.{i}.ssm_conv1d.weight", padded(own["mamba.conv1d.weight"][:, 0], "xBC"), exact=True)
        add(f"blk.{i}.ssm_conv1d.bias", padded(own["mamba.conv1d.bias"], "xBC"))
        add(f"blk.{i}.ssm_dt.bias", padded(own["mamba.dt_bias"], "d"))
        add(f"blk.{i}.ssm_a", padded(-own["mamba.A_log"].exp(), "d")[:, None], exact=True)
        add(f"blk.{i}.ssm_d", padded(own["mamba.D"], "d")[:, None], exact=True)
        add(f"blk.{i}.ssm_norm.weight", padded(own["mamba.norm.weight"], "x").view(heads, -1), exact=True)
        add(f"blk.{i}.ssm_out.weight", padded(own["mamba.out_proj.weight"].T, "x").T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotary(config: GraniteMoeHybridConfig) -> tuple[Tensor | None, float]:
    """What each frequency of the rotary embedding is divided by, (head_dim / 2,), None for no scaling; and what queries
    and keys are multiplied by.

    llama.cpp computes some scalings itself, but takes the result of any of them, which leaves nothing to differ in.
    """
    kind = cast(dict, config.rope_parameters).get("rope_type", "default")
    if kind == "default":
        return None, 1.0
    plain, _ = GraniteMoeHybridRotaryEmbedding.compute_default_rope_parameters(config)
    scaled, magnitude = ROPE_INIT_FUNCTIONS[kind](config)
    return plain / scaled, magnitude


# Tokenizer


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Adds the tokens, one for each row of the embeddings, how text becomes tokens, and the chat template."""
    told = _description(tokenizer)
    model, pre = told["model"], _pre_tokenizer(told)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    names, types = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    scores = [0.0] * rows
    for name, i in model["vocab"].items():
        names[i], types[i] = name, gguf.TokenType.NORMAL
        if pre is None and name.startswith("<0x") and len(name) == 6:
            types[i] = gguf.TokenType.BYTE
    for token in told["added_tokens"]:
        i, types_ = token["id"], gguf.TokenType
        names[i], types[i] = token["content"], types_.CONTROL if token["special"] else types_.USER_DEFINED
    if pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(names)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:  # what is merged first is what has the highest score
        for rank, pair in reversed([*enumerate(merges)]):
            scores[model["vocab"]["".join(pair)]] = -float(rank)
        if (unknown := tokenizer.unk_token_id) is not None:
            types[unknown] = gguf.TokenType.UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(names)
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(tokenizer.convert_ids_to_tokens(_ids(tokenizer, "a", False))[0] != "a")
    writer.add_token_types(types)
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = _ids(tokenizer, "a", True)
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _description(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What tokenizer.json has. Raises ExportError for a tokenizer that llama.cpp has no like of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    if told["model"]["type"] != "BPE" or not told["model"]["merges"]:
        raise ExportError(
            f"gguf cannot hold this tokenizer: it holds BPE with merges, not {told['model']['type']}"
            f"{' without' if told['model']['type'] == 'BPE' else ''}; use another format"
        )
    return told


def _pre_tokenizer(told: dict) -> str | None:
    """llama.cpp's name of how text is split before byte-level merges; None for SentencePiece's merges.

    Raises ExportError where it has none.
    """
    first = told["pre_tokenizer"] or {}
    parts = first.get("pretokenizers", [first] if first else [])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(parts[0]["pattern"].get("Regex"))) is not None:
        return name
    if told["model"]["byte_fallback"] and set(kinds) <= {"Metaspace"}:
        return None
    raise ExportError(
        f"gguf cannot hold this tokenizer: how it splits text ({' and '.join(kinds) or 'not at all'}) has no name in "
        "llama.cpp that is known here; use another format"
    )


def check_tokenizer(student: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ExportError where llama.cpp makes other tokens of text; a model of zeros will do to find out."""
    config = copy.deepcopy(granite.config_of(student))
    config.update(
        {"hidden_size": 32, "intermediate_size": 32, "shared_intermediate_size": 32, "num_hidden_layers": 2}
        | {"layer_types": ["full_attention", "linear_attention"], "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"head_dim": 16, "mamba_n_heads": 2, "mamba_n_groups": 2, "mamba_d_head": 16, "mamba_d_state": 16}
        | {"mamba_expand": 1, "attention_bias": False, "mamba_proj_bias": False, "tie_word_embeddings": True}
    )
    with torch.device("meta"):
        shapes = GraniteMoeHybridForCausalLM(config).state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        state = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
        _write_file(Path(scratch) / FILE, config, state, tokenizer, torch.float32)
        _compare_tokens(tokenizer, _in_llama_cpp(Path(scratch) / FILE, tokenizer, []))


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = [*PROBES, "a".join(map(str, tokenizer.special_tokens_map.values()))]
    composes = (_description(tokenizer)["normalizer"] or {}).get("type") == "NFC"  # which llama.cpp leaves to its users
    return [unicodedata.normalize("NFC", text) for text in texts] if composes else texts


def _compare_tokens(tokenizer: PreTrainedTokenizerBase, found: dict) -> None:
    for text, ids in zip(_texts(tokenizer), found["texts"], strict=True):
        if ids != _ids(tokenizer, text, True):
            raise ExportError(f"the tokenizer is another one in llama.cpp, of {text!r} for one; use another format")
    if tokenizer.chat_template and found["chat"] != _chat(tokenizer):
        raise ExportError("the chat template gives another prompt in llama.cpp; use another format")


# Check


def check(
    student: HybridForCausalLM, folder: Path, dtype: torch.dtype | str, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, float]:
    """Compares the file in llama.cpp with the student, in float32: what it makes of text, and its log-probabilities of
    the most likely tokens after prompts ("logits") and in single steps ("decode"): of greedy answers to random tokens
    and to a chat question, where there is a chat template, and of a text.

    The figures have "kl" besides: the divergence from the student, in nats a token, mean over those of text and chat.
    As llama.cpp computes in as few bits as weights have, these weights in float32 are compared, too, as closely as
    others; of quantised weights it is these that the figures are of, and what quantising costs is one more.

    Raises ExportError where they are not equal, or fewer bits cost more than they can.
    """
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    exact = _before_quantising(dtype)
    model = as_written(student, exact)
    sequences = _sequences(model, tokenizer)
    figures = {}
    if dtype != torch.float32:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _write_student(Path(scratch) / FILE, student, exact, tokenizer, torch.float32)
            figures = _compare(Path(scratch) / FILE, tokenizer, sequences, TOLERANCE)
    found = _compare(folder / FILE, tokenizer, sequences, TOLERANCE if dtype == torch.float32 else math.inf)
    if not found["kl"] <= WORST:
        name = str(dtype).removeprefix("torch.")
        raise ExportError(
            f"in {name} the student is another one in llama.cpp: that costs {found['kl']:.3f} nats a token, more than "
            f"{WORST}; use dtype float32"
        )
    return figures | {dtype: found["kl"]} if isinstance(dtype, str) else found


def _compare(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    sequences: list["_Sequence"],
    tolerance: float,
) -> dict[str, float]:
    """The figures of `check`.

    Raises ExportError where they differ by more than the tolerance.
    """
    found = _in_llama_cpp(path, tokenizer, [(one.ids.tolist(), one.at_once) for one in sequences])
    _compare_tokens(tokenizer, found)
    figures = {"logits": 0.0, "decode": 0.0, "scale": 0.0}
    behind, divergences = 0.0, []
    for one, steps in zip(sequences, found["steps"], strict=True):
        figures["scale"] = max(figures["scale"], one.logits.abs().max().item())
        expected = one.logits.log_softmax(-1)
        for i, (tokens, theirs) in enumerate(steps):
            own = expected[one.at_once - 1 + i]
            worst = (torch.tensor(theirs) - own[tokens]).abs().max().item()
            name = "decode" if i else "logits"
            figures[name] = max(figures[name], worst)
            behind = max(behind, (own.max() - own[tokens[0]]).item())
            if one.text:
                divergences.append(_divergence(own[tokens], torch.tensor(theirs)))
    figures["kl"] = sum(divergences) / len(divergences)
    bound = tolerance * max(1.0, figures["scale"])
    worst = max(figures["logits"], figures["decode"])
    if not (worst <= bound and behind <= bound):
        raise ExportError(
            f"what was written is not equal to the student in llama.cpp: log-probabilities differ by {worst:.2e}, the "
            f"token it takes is {behind:.2e} behind, more than {bound:.2e}"
        )
    return figures


def _divergence(own: Tensor, theirs: Tensor) -> float:
    """KL in nats, of log-probabilities of the most likely tokens; all others count as one."""

    def with_rest(some: Tensor) -> Tensor:
        return torch.cat([some, (1 - some.exp().sum()).clamp(min=1e-9).log()[None]])

    own, theirs = with_rest(own.double()), with_rest(theirs.double())
    return (own.exp() * (own - theirs)).sum().item()


def _chat(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    inputs: Any = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)
    return inputs["input_ids"]


@dataclass
class _Sequence:
    """Tokens (L,) of which so many come at once and the others one by one; the student's logits (L, vocabulary); and
    whether it is text: what random tokens are answered says nothing of a model's quality."""

    ids: Tensor
    at_once: int
    logits: Tensor
    text: bool


@torch.no_grad()
def _sequences(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[_Sequence]:
    """What `check` compares."""
    longest = model.config.max_position_embeddings

    def answered(prompt: Tensor, text: bool) -> _Sequence:
        prompt = prompt[None, : longest - STEPS]
        with generating(model, min_new_tokens=STEPS, max_new_tokens=STEPS, do_sample=False):
            ids = generated(model, input_ids=prompt, attention_mask=torch.ones_like(prompt))
        return _Sequence(ids[0], prompt.shape[1], model(ids, use_cache=False).logits[0], text)

    found = []
    for length in PROMPTS:
        generator = torch.Generator().manual_seed(length)
        found.append(answered(torch.randint(3, model.config.vocab_size, (length,), generator=generator), text=False))
    if tokenizer.chat_template:
        found.append(answered(torch.tensor(_chat(tokenizer)[: max(PROMPTS)]), text=True))
    ids = torch.tensor(_ids(tokenizer, TEXT, True)[: min(sum(TEXT_STEPS), longest)])
    return [*found, _Sequence(ids, TEXT_STEPS[0], model(ids[None], use_cache=False).logits[0], text=True)]


def _in_llama_cpp(path: Path, tokenizer: PreTrainedTokenizerBase, sequences: list) -> dict:
    """What llama.cpp, in a process of its own, makes of texts, a chat question and sequences.

    Of each sequence, [tokens, count], so many tokens come at once and the others one by one; found are the most likely
    tokens after each of these, and their log-probabilities.

    Raises ExportError where it does not load the file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        chat = QUESTION if tokenizer.chat_template else None
        asked = {"texts": _texts(tokenizer), "chat": chat, "sequences": sequences, "likely": MOST_LIKELY}
        asked |= {"whole": _ids(tokenizer, "a", False)[-1], "threads": torch.get_num_threads()}
        write_json(Path(scratch) / "asked.json", asked)
        command = [sys.executable, "-c", _ASK, str(path.resolve()), scratch]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line.lower() or "assert" in line.lower()), lines[-1])
            raise ExportError(f"what was written does not load in llama.cpp: {first.strip()}")
        return read_json(Path(scratch) / "found.json")


_ASK = """
import json, sys, urllib.request
sys.modules["transpoint"] = None
import xllamacpp
path, scratch = sys.argv[1:]
asked = json.load(open(scratch + "/asked.json"))
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup, params.fit_params = 256, 1, 0, False, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
params.use_jinja = True
params.port = 0
server = xllamacpp.Server(params)
def post(name, **body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + name, json.dumps(body).encode(), headers)
    return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))
def tokens(text, special):
    return post("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]
found = {"texts": [tokens(text, True) for text in asked["texts"]], "steps": []}
if asked["chat"]:
    found["chat"] = tokens(post("/apply-template", messages=asked["chat"])["prompt"], False)
for ids, length in asked["sequences"]:
    steps = []
    for end in range(length, len(ids)):
        # The server tells no probabilities of a token that is part of a character: it is made to take another one.
        answer = post("/completion", prompt=ids[:end], n_predict=1, n_probs=asked["likely"], temperature=0,
                      cache_prompt=True, logit_bias=[[asked["whole"], 1e6]])
        assert end == length or answer["timings"]["prompt_n"] == 1, f"error: no single step, {answer['timings']}"
        likely = answer["completion_probabilities"][0]["top_logprobs"]
        steps.append([[one["id"] for one in likely], [one["logprob"] for one in likely]])
    found["steps"].append(steps)
json.dump(found, open(scratch + "/found.json", "w"))
"""


def _snippet(path: str) -> str:
    return (
        f"# In a shell: llama-cli -m {path}/{FILE}. In Python (pip install xllamacpp):\n"
        "import xllamacpp\n"
        "params = xllamacpp.CommonParams()\n"
        f'params.model.path = "{path}/{FILE}"\n'
        "server = xllamacpp.Server(params)  # server.listening_address: as llama-server\n"
        'question = {"role": "user", "content": "What is the capital of France?"}\n'
        'answer = server.handle_chat_completions({"messages": [question]})'
    )


GGUF = Format(
    name="gguf",
    why_no_student=why_no_student,
    why_not=why_not,
    write=write,
    check=check,
    check_tokenizer=check_tokenizer,
    note=lambda student: (
        f"It is one file for llama.cpp, `{FILE}`, with tokenizer and chat template. transformers has no model for"
        " it:\n"
        "what is measured here is the student that it is equal to. What `llama-quantize` makes of it is another model."
    ),
    engines=lambda student: (
        Engine("llama.cpp (xllamacpp 2026.10)", TRIED),
        Engine("Ollama, LM Studio and others built on it", READ, "where their llama.cpp is as recent"),
    ),
    library="llama.cpp",
    loads=False,
    snippet=_snippet,
    quantised={"q8_0": _why_not_q8_0},
)
