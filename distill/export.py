"""From a student to a folder that others load: `native` in plain transformers, `custom` with its own modeling files.

`native` is GraniteMoeHybrid without experts, which holds a Llama-, Mistral- or Qwen2-style model with Mamba-2 layers
exactly, needs no remote code, and is served by vLLM and SGLang. Its mixer has one B/C group for each head, so x and B
are expanded from key/value heads to query heads, and its gated norm is then one for each head, as ours is.

Every export ends by loading the folder in a fresh process in which Transpoint cannot be imported, and comparing logits.
"""

import copy
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedTokenizerBase

from ..students import HybridForCausalLM, Mamba2Mixer, StudentConfig
from ..students.build import hybrid_generation_config
from ..students.configuration_hybrid import AUTO_MAP
from .card import CardFacts, write_card
from .files import read_json, write_json
from .tokenizers import PROBES, first_difference, save_tokenizer, tokenizer_facts

logger = logging.getLogger(__name__)

FORMATS = ("native", "custom")
TOLERANCE = 1e-4  # of logits in float32, relative to the largest
NATIVE_FAMILIES = ("llama", "mistral", "qwen2")  # what is outside attention is then the same arithmetic
NATIVE_NEEDS = "5.23"  # transformers before it normalises over all heads at once: silently other logits
_ONE_FORM = "a layer of it is attention or Mamba-2, not one up to a TransPoint and then the other"


class ExportError(ValueError):
    """A student that a format cannot hold, or an export that is not equal to it. One line with the reason."""


def export(
    student: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    format: str = "native",
    dtype: torch.dtype = torch.float32,
    facts: CardFacts | None = None,
) -> dict[str, float]:
    """Writes the student to `folder` and verifies it.

    Args:
        format: `native` or `custom`.
        dtype: of the weights written.
        facts: what the model card says besides.

    Returns:
        {"logits": largest difference of the reloaded model's logits from the student's, "decode": of its logits token
        by token with a cache from those all at once, "scale": the largest logit}, in float32.

    Raises:
        ExportError: the format cannot hold this student, or what was written is not equal to it. `folder` is then as it
            was before.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not is_export(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"'{folder}' is there and is no earlier export: name another folder, or remove it")
    if format not in FORMATS:
        raise ExportError(f"format '{format}' is not known; expected one of {', '.join(FORMATS)}")
    if reason := why_not(student, format):
        raise ExportError(f"{format} cannot hold this student: {reason}")
    student.generation_config = hybrid_generation_config(student.generation_config)  # one of an earlier version may not
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write = _write_native if format == "native" else _write_custom
        write(student, partial, dtype)
        save_tokenizer(tokenizer, partial)
        figures = verify(student, partial, dtype, tokenizer)
        write_card(partial, student, format, figures, facts or CardFacts())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return figures


def is_export(folder: Path) -> bool:
    """Whether a folder was written by `export`."""
    card = folder / "README.md"
    return (folder / "config.json").is_file() and card.is_file() and "transpoint" in card.read_text(encoding="utf-8")


def why_not(student: HybridForCausalLM, format: str) -> str | None:
    """Why a format cannot hold this student; None if it can."""
    if format == "custom":
        return None
    config, mixers = student.config, [mixer for mixer in student.mixer_layers() if mixer is not None]
    if reason := _too_old():
        return reason
    if "transmamba" in config.mixers:
        return f"{_ONE_FORM}; use format custom"
    if config.base_model_type not in NATIVE_FAMILIES:
        return f"it holds what {', '.join(NATIVE_FAMILIES)} have, not {config.base_model_type}; use format custom"
    mixer = mixers[0]
    lacking = [
        text
        for wrong, text in (
            (mixer.rope, "student.rope (must be false)"),
            (mixer.conv_activation != "silu", "student.conv_activation (must be silu)"),
            (not mixer.gate, "student.gate (must be true)"),
            (mixer.norm is None, "student.norm (must be true)"),
            (mixer.q_norm is not None, "student.qk_norm (must be false)"),
        )
        if wrong
    ]
    if lacking:
        return f"its Mamba-2 layer is fixed in {', '.join(lacking)}; use format custom"
    if mixer.num_heads * mixer.head_dim % config.hidden_size:
        return (
            f"its Mamba-2 width must be a multiple of the hidden size {config.hidden_size}, "
            f"and {mixer.num_heads} heads of {mixer.head_dim} are not; use format custom"
        )
    if config.hidden_act != "silu":
        return f"its activation is silu throughout, not {config.hidden_act}; use format custom"
    attention = [layer.self_attn for layer in student.get_decoder().layers if layer.self_attn not in mixers]
    window = getattr(config, "sliding_window", None)
    if attention and window is not None and window < config.max_position_embeddings:
        return f"its attention has no sliding window ({window} tokens here); use format custom"
    if any(hasattr(module, "q_norm") for module in attention):
        return "its attention has no q/k norms; use format custom"
    if any(linear.bias is not None for layer in student.get_decoder().layers for linear in _mlp(layer)):
        return "its MLP has no biases; use format custom"
    return None


def why_no_student(format: str, config: StudentConfig) -> str | None:
    """Why a format can hold no student of this config, whatever the teacher; None if it may."""
    if format == "custom":
        return None
    if config.mixer == "transmamba":
        return f"{_ONE_FORM}; use export.format=custom"
    own = config.resolved()
    lacking = [
        f"student.{name} (must be {wanted})"
        for name, wanted in (("rope", "false"), ("conv_activation", "silu"), ("gate", "true"), ("norm", "true"))
        if str(getattr(own, name)).lower() != wanted
    ]
    if lacking:
        return f"its Mamba-2 layer is fixed in {', '.join(lacking)}; use export.format=custom"
    return _too_old()


def _too_old() -> str | None:
    if Version(transformers.__version__) >= Version(NATIVE_NEEDS):
        return None
    return (
        f"transformers {transformers.__version__} normalises all heads of a Mamba-2 layer together; "
        f"it takes {NATIVE_NEEDS} or later, or format custom"
    )


def check_tokenizer(student: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, format: str) -> None:
    """Raises ExportError where a tokenizer would not be itself in an export, which needs no weights to be found out."""
    with tempfile.TemporaryDirectory() as scratch:
        if format == "custom":
            config = copy.deepcopy(student.config)
            config.auto_map = AUTO_MAP
        else:
            config = native_config(student)
        config.save_pretrained(scratch)
        save_tokenizer(tokenizer, scratch)
        found = AutoTokenizer.from_pretrained(scratch)
        _refuse_another(tokenizer, json.loads(json.dumps(tokenizer_facts(found, PROBES))))


def _refuse_another(tokenizer: PreTrainedTokenizerBase, found: dict) -> None:
    own = json.loads(json.dumps(tokenizer_facts(tokenizer, PROBES)))
    if (name := first_difference(own, found)) is not None:
        raise ExportError(
            f"the tokenizer is another one when it is loaded with what was written: its {name} differ; save the "
            "teacher's tokenizer as PreTrainedTokenizerFast, or use another format"
        )


def verify(
    student: HybridForCausalLM,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, float]:
    """Compares the model in `folder`, loaded in a fresh process without Transpoint, with the student, in float32, and
    its tokenizer with the student's.

    A student with TransPoints is compared a second time with early ones, so that every layer passes its own.

    Returns the figures of `export`. Raises ExportError if the folder does not load or is not equal.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(48, student.config.max_position_embeddings)
    ids = torch.randint(3, student.config.vocab_size, (2, length), generator=generator)
    expected = {"ids": ids, "logits": _logits_as_written(student, ids, dtype)}
    if "transmamba" in student.config.mixers:
        early = 5 * length // 8
        expected |= {"early": torch.tensor(early), "early_logits": _logits_as_written(student, ids, dtype, early)}
    with tempfile.TemporaryDirectory() as scratch:
        save_file(expected, f"{scratch}/expected.safetensors")
        write_json(Path(scratch) / "probes.json", PROBES)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        command = [sys.executable, "-c", _VERIFY, str(folder.resolve()), scratch]
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"what was written does not load without Transpoint: {last}")
        figures = read_json(Path(scratch) / "figures.json")
        if tokenizer is not None:
            _refuse_another(tokenizer, read_json(Path(scratch) / "tokenizer.json"))
    bound = TOLERANCE * max(1.0, figures["scale"])
    for name in ("logits", "decode"):
        if not figures[name] <= bound:
            raise ExportError(
                f"what was written is not equal to the student: {name} differ by {figures[name]:.2e}, "
                f"more than {bound:.2e}"
            )
    return figures


# Runs where Transpoint is not: what a user who has only transformers would see.
_VERIFY = (
    f"""
{inspect.getsource(tokenizer_facts)}
"""
    + """
import json, sys
sys.modules["transpoint"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, scratch = sys.argv[1:]
expected = load_file(scratch + "/expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
facts = tokenizer_facts(tokenizer, json.load(open(scratch + "/probes.json")))
json.dump(facts, open(scratch + "/tokenizer.json", "w"))
ids = expected["ids"]
@torch.no_grad()
def compare(logits):
    full = model(ids, use_cache=False).logits
    prefill = model(ids[:, : ids.shape[1] // 2], use_cache=True)
    name = "cache" if "cache" in prefill else "past_key_values"  # before transformers 5.24
    cache, steps = prefill[name], [prefill.logits]
    for i in range(ids.shape[1] // 2, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], **{name: cache}, use_cache=True).logits)
    return (full - logits).abs().max().item(), (torch.cat(steps, dim=1) - full).abs().max().item()
found = [compare(expected["logits"])]
if "early" in expected:
    model.set_trans_points(expected["early"].item(), warn=False)
    found.append(compare(expected["early_logits"]))
figures = dict(zip(("logits", "decode"), map(max, zip(*found))), scale=expected["logits"].abs().max().item())
json.dump(figures, open(scratch + "/figures.json", "w"))
"""
)


@torch.no_grad()
def _logits_as_written(
    student: HybridForCausalLM, ids: Tensor, dtype: torch.dtype, trans_points: int | None = None
) -> Tensor:
    """The student's logits in float32, on the CPU, its weights rounded as they are written."""
    model = type(student)._from_config(copy.deepcopy(student.config), dtype=torch.float32).eval()
    state = {name: tensor.cpu().to(_written(name, dtype)).float() for name, tensor in student.state_dict().items()}
    model.load_state_dict(state)
    if trans_points is not None:
        model.set_trans_points(trans_points, warn=False)
    return model(ids, use_cache=False).logits.contiguous()


def _written(name: str, dtype: torch.dtype) -> torch.dtype:
    """Decay, step and skip stay in float32: bfloat16 loses them."""
    return torch.float32 if name.endswith((".A_log", ".dt_bias", ".D")) else dtype


def _write_custom(student: HybridForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(_written(name, dtype)) for name, tensor in student.state_dict().items()}
    student.save_pretrained(folder, state_dict=state)
    config = copy.deepcopy(student.config)
    config.dtype, config.auto_map = dtype, AUTO_MAP
    config.save_pretrained(folder)  # with the code


def _write_native(student: HybridForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    config, state = native_config(student), native_state(student)
    config.dtype = dtype
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM(config)
    model.load_state_dict(
        {name: tensor.to(_written(name, dtype)) for name, tensor in state.items()}, assign=True, strict=True
    )
    model.tie_weights()
    model.generation_config = student.generation_config
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    # llama.cpp's converter matches the older names, which transformers maps; SGLang reads only a top-level rope_theta.
    written["layer_types"] = ["mamba" if t == "linear_attention" else "attention" for t in config.layer_types]
    written["rope_theta"] = config.rope_parameters["rope_theta"]
    write_json(folder / "config.json", written)


def native_config(student: HybridForCausalLM) -> GraniteMoeHybridConfig:
    """The GraniteMoeHybrid config that holds this student."""
    config, layers = student.config, student.get_decoder().layers
    mixer = next(mixer for mixer in student.mixer_layers() if mixer is not None)
    types = ["full_attention" if m == "attention" else "linear_attention" for m in config.mixers]
    head_dim, heads = mixer.head_dim, mixer.num_heads
    return GraniteMoeHybridConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        shared_intermediate_size=config.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        # transformers cannot run it with no attention layer at all: one that adds nothing is appended.
        layer_types=types if "full_attention" in types else [*types, "full_attention"],
        num_hidden_layers=len(types) + ("full_attention" not in types),
        num_attention_heads=heads,
        num_key_value_heads=mixer.num_kv_heads,
        head_dim=head_dim,
        hidden_act="silu",
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        attention_bias=any(
            getattr(layer.self_attn, name).bias is not None
            for layer, type_ in zip(layers, types, strict=True)
            if type_ == "full_attention"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        position_embedding_type="rope",
        rope_parameters=dict(config.rope_parameters),
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        mamba_n_heads=heads,
        mamba_n_groups=heads,
        mamba_d_head=head_dim,
        mamba_d_state=head_dim,
        mamba_d_conv=mixer.conv1d.kernel_size[0],
        mamba_expand=heads * head_dim // config.hidden_size,
        # Changes no result. transformers' plain scan takes memory with it: one B/C group a head, and no fused kernel.
        mamba_chunk_size=64,
        mamba_conv_bias=True,
        mamba_proj_bias=True,  # the gate's bias
    )


@torch.no_grad()
def native_state(student: HybridForCausalLM) -> dict[str, Tensor]:
    """The student's weights under GraniteMoeHybrid's names, x and B expanded to all heads."""
    config, decoder = native_config(student), student.get_decoder()
    state = {
        "model.embed_tokens.weight": decoder.embed_tokens.weight,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": student.get_output_embeddings().weight,
    }
    for i, (layer, mixer) in enumerate(zip(decoder.layers, student.mixer_layers(), strict=True)):
        gate, up, down = _mlp(layer)
        own = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
            "shared_mlp.input_linear.weight": torch.cat([gate.weight, up.weight]),
            "shared_mlp.output_linear.weight": down.weight,
        }
        own |= _native_attention(layer.self_attn, config) if mixer is None else _native_mixer(mixer)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in own.items()}
    if config.num_hidden_layers > len(decoder.layers):
        # A layer whose attention and MLP both project to nothing: its residual stream passes unchanged.
        with torch.device("meta"):
            shapes = GraniteMoeHybridForCausalLM(config).state_dict()
        prefix = f"model.layers.{len(decoder.layers)}."
        state |= {name: torch.zeros(t.shape) for name, t in shapes.items() if name.startswith(prefix)}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _native_attention(attention: nn.Module, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    own = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, name)
        own[f"self_attn.{name}.weight"] = linear.weight
        if config.attention_bias:  # all four or none
            own[f"self_attn.{name}.bias"] = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return own


def _native_mixer(mixer: Mamba2Mixer) -> dict[str, Tensor]:
    def expanded(part: Tensor, name: str) -> Tensor:  # rows of one part: each key/value head once for each query head
        if name not in ("x", "B"):
            return part
        by_head = part.unflatten(0, (mixer.num_kv_heads, mixer.head_dim))
        return by_head.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=0).flatten(0, 1)

    def split(tensor: Tensor, names: str) -> Tensor:
        parts = tensor.split([mixer.sizes[name] for name in names.split()])
        return torch.cat([expanded(part, name) for part, name in zip(parts, names.split(), strict=True)])

    projection = split(mixer.in_proj.weight, "z x B C dt")
    bias = projection.new_zeros(projection.shape[0])
    bias[: mixer.sizes["z"]] = mixer.z_bias
    out_bias = mixer.out_proj.bias
    return {
        "mamba.in_proj.weight": projection,
        "mamba.in_proj.bias": bias,
        "mamba.conv1d.weight": split(mixer.conv1d.weight, "x B C"),
        "mamba.conv1d.bias": split(mixer.conv1d.bias, "x B C"),
        "mamba.dt_bias": mixer.dt_bias,
        "mamba.A_log": mixer.A_log,
        "mamba.D": mixer.D,
        "mamba.norm.weight": mixer.norm.weight,
        "mamba.out_proj.weight": mixer.out_proj.weight,
        "mamba.out_proj.bias": bias.new_zeros(mixer.out_proj.out_features) if out_bias is None else out_bias,
    }


def _mlp(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
