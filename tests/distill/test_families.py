"""Every family of transformers: one that converts is right in all that is built on it, the others are refused.

Those that must convert are tried; with TRANSPOINT_UPDATE=1, and where the installed version is not that of
docs/families.md, all that it has, so that a new one is tried the day it appears.
"""

import copy
import json
import os
import sys

import pytest
import torch
import transformers
from decoding import stirred
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fresh
from families import tiny_teacher
from run_files import ROOT
from transpoint.distill.export.formats import find_format
from transpoint.distill.export.granite import too_old
from transpoint.distill.objectives import Distillation
from transpoint.distill.settings import DistillConfig
from transpoint.distill.train.flops import distill_flops
from transpoint.students import HybridForCausalLM, StudentConfig, StudentError, build_student
from transpoint.teachers import TeacherError, output_head

pytestmark = [pytest.mark.stack, pytest.mark.slow]

# They have converted, and must.
CONVERT = {"apertus", "arcee", "gemma", "granite", "llama", "mistral", "mixtral", "nemotron", "olmo", "qwen2", "qwen3"}
CONVERT |= {"qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"}
# By readers of their own, norms over all heads, rotary embeddings by layer type.
CONVERT |= {"gpt_neox", "phi", "phi3", "olmo2", "olmo3", "gemma3_text"}
TABLE = ROOT / "docs" / "families.md"
UPDATE = bool(os.environ.get("TRANSPOINT_UPDATE"))
ALL = UPDATE or f"transformers {transformers.__version__}," not in TABLE.read_text()
# One of each kind of code: gated and plain MLPs, experts, norms of queries, keys and sums, parts in one matrix.
EXPORTED_KINDS = {"llama", "nemotron", "mixtral", "qwen3", "gemma3_text", "olmo3", "phi", "phi3", "gpt_neox", "granite"}


def convert(family, **options):
    """Teacher and student, or None where there is no teacher, or why it is refused: in one line."""
    teacher = tiny_teacher(family)
    if teacher is None:
        return None
    try:
        return teacher, build_student(teacher, StudentConfig(**options))
    except (TeacherError, StudentError) as error:
        assert str(error) and "\n" not in str(error)
        return str(error)


def tokens(length, seed=0, batch=1):
    return torch.randint(3, 259, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tried():
    families = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if ALL else CONVERT
    return {family: convert(family, keep_attention=[1]) for family in sorted(families)}


@pytest.fixture(scope="module")
def converted(tried):
    return {family: pair for family, pair in tried.items() if isinstance(pair, tuple)}


@pytest.fixture(scope="module")
def transmamba(converted):
    pairs = {family: convert(family, mixer="transmamba", trans_points="teacher") for family in converted}
    return {family: pair for family, pair in pairs.items() if isinstance(pair, tuple)}


@pytest.mark.parametrize(
    "family, reason",
    [
        ("granitemoehybrid", "GraniteMoeHybridDecoderLayer. is not understood: it has no `self_attn` or `attention`"),
        ("ministral3", "layer 0 .Ministral3Attention. is not understood: .* fails with TypeError: .*position_ids"),
        ("falcon_h1", "FalconH1ForCausalLM: its layers remember more than keys and values"),
        ("persimmon", "is not understood: it lacks k_proj, o_proj, q_proj, v_proj and has dense, k_layernorm"),
    ],
)
def test_families_that_are_refused(family, reason):
    with pytest.raises((TeacherError, StudentError), match=reason):
        build_student(tiny_teacher(family), StudentConfig())


def failures(converted, check):
    """What `check(teacher, student)` says of each family, where it says something or fails."""
    found = {}
    for family, pair in converted.items():
        try:
            said = check(*pair)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        if said:
            found[family] = said
    return found


def differ(found, expected):
    """Says by how much, relative to the largest expected, where that is more than rounding."""
    error = (found - expected).abs().max() / expected.abs().max()
    return None if error < 1e-4 else f"off by {error:.1e}"


def test_families_that_have_converted_still_do(converted):
    assert converted.keys() >= CONVERT


@torch.no_grad()
def test_the_loss_is_the_kl_of_the_models_own_logits(converted):
    ids = tokens(24, batch=2)
    batch = {"input_ids": ids, "position_ids": torch.arange(24).expand(2, -1)}

    def check(teacher, student):
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (teacher, student))
        wanted = (p.exp() * (p - q)).sum(-1).mean()
        return differ(Distillation(teacher, student, DistillConfig())(batch)[0].double(), wanted)

    assert failures(converted, check) == {}
    assert output_head(converted["granite"][0]).extras == {"scale": 0.125}


@torch.no_grad()
def test_a_student_that_keeps_attention_up_to_the_end_is_its_teacher(transmamba):
    ids = tokens(24)
    assert transmamba.keys() >= CONVERT  # some are refused as such
    assert failures(transmamba, lambda teacher, student: differ(student(ids).logits, teacher(ids).logits)) == {}


@torch.no_grad()
def test_decoding_with_a_cache_is_decoding_without(converted):
    ids = tokens(20)

    def check(teacher, student):
        cache = student.new_cache()
        parts = [student(part, cache=cache).logits for part in (ids[:, :12], *ids[:, 12:].split(1, 1))]
        return differ(torch.cat(parts, 1), student(ids, use_cache=False).logits)

    assert failures(converted, check) == {}


@torch.no_grad()
def test_packed_documents_and_padding_reach_the_mixers(converted):
    first, second, zeros = tokens(9), tokens(15, seed=1), torch.zeros(1, 6, dtype=torch.long)
    positions = torch.cat((torch.arange(9), torch.arange(15)))[None]
    mask = torch.cat((zeros, torch.ones_like(first)), 1)

    def check(teacher, student):
        alone = [student(ids, use_cache=False).logits for ids in (first, second)]
        packed = student(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
        padded = student(
            torch.cat((zeros, first), 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        )
        return differ(packed, torch.cat(alone, 1)) or differ(padded.logits[:, 6:], alone[0])

    assert failures(converted, check) == {}


@torch.no_grad()
def test_operations_are_those_that_pytorch_counts(converted):
    ids = tokens(1, batch=64)  # of one token each: of longer ones PyTorch counts the masked scores too

    def check(teacher, student):
        try:
            both = distill_flops(teacher, student.requires_grad_(False), 1)
        except ValueError as error:  # experts that do not say how many a token is sent to
            return str(error) if teacher.config.model_type in CONVERT else None
        found = both - distill_flops(None, student, 1)
        model = copy.deepcopy(teacher)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")  # others compute with padding, or in kernels that it does not know
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False)
        return differ(torch.tensor(found), torch.tensor(counter.get_total_flops() / 64))

    assert failures(converted, check) == {}


@torch.no_grad()
def test_a_student_is_saved_and_loaded(converted, tmp_path):
    ids = tokens(12)

    def check(teacher, student):
        student.save_pretrained(tmp_path / student.config.base_model_type)
        loaded = HybridForCausalLM.from_pretrained(tmp_path / student.config.base_model_type)
        wanted, found = student.state_dict(), loaded.state_dict()
        if found.keys() != wanted.keys() or not all(torch.equal(found[name], wanted[name]) for name in wanted):
            return "weights differ"
        return differ(loaded(ids).logits, student(ids).logits)  # experts do not multiply alike wherever weights lie

    assert failures(converted, check) == {}


EXPORTED = """
import json, pathlib, sys
sys.modules["transpoint"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        logits = model(expected["ids"]).logits
    found[folder.name] = ((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
print(json.dumps(found))
"""


def test_exports_with_their_own_code_load_where_transpoint_is_not(converted, tmp_path):
    ids = tokens(12)
    kinds = converted.keys() if ALL else EXPORTED_KINDS
    for family in kinds:
        student = converted[family][1]
        find_format("custom").write(student, tmp_path / "exports" / family, torch.float32)
        with torch.no_grad():
            expected = {"ids": ids, "logits": student(ids).logits.contiguous()}
        save_file(expected, tmp_path / "exports" / family / "expected.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", EXPORTED, str(tmp_path / "exports")]
    done = fresh.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == kinds and {family: e for family, e in found.items() if not e < 1e-4} == {}


@torch.no_grad()
@pytest.mark.skipif(bool(too_old()), reason=str(too_old()))
def test_native_exports_are_the_student_in_plain_transformers(converted, tmp_path):
    native, ids = find_format("native"), tokens(24)
    held = {family: student for family in converted if native.why_not(student := build_native(family)) is None}
    assert held.keys() >= {"llama", "mistral", "qwen2", "smollm3", "seed_oss", "granite", "mixtral"}

    def check(family, student):
        native.write(stirred(student), tmp_path / family, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family).eval()
        return differ(model(ids).logits, student.eval()(ids).logits)

    assert failures({family: (family, student) for family, student in held.items()}, check) == {}


def test_the_table_of_families_is_of_this_version(tried, converted, transmamba):
    """Written anew with TRANSPOINT_UPDATE=1; what its columns say, the tests above have tried."""
    rows = rows_of(converted, transmamba)
    if UPDATE:
        TABLE.write_text(table(tried, rows))
    written = TABLE.read_text().split("## Refused")[0].splitlines()
    assert {line.split()[1] for line in written if line.startswith("| ")} >= CONVERT
    assert ALL or set(rows) <= set(written), "docs/families.md: run this test with TRANSPOINT_UPDATE=1"


def rows_of(converted, transmamba):
    native, rows = find_format("native"), []
    for family in converted:
        formats = "custom" if native.why_not(build_native(family)) else "native, custom"
        rows.append(f"| {family} | {'yes' if family in transmamba else 'no'} | {formats} |")
    return rows


def table(tried, rows):
    refused = {family: reason for family, reason in tried.items() if isinstance(reason, str)}
    reasons = "\n".join(f"| {family} | {reason} |" for family, reason in refused.items())
    return f"""# Teacher families

With transformers {transformers.__version__}, as `TRANSPOINT_UPDATE=1 python -m pytest tests/distill/test_families.py`
found it: every model type that is a causal language model there, with a tiny random model.

Of those that convert, the weights are transferred into a student with Mamba-2 layers; a TransMamba student whose
TransPoints are infinite has the teacher's logits; decoding with a cache is decoding without; packed documents and
padding reach the mixers; the loss is the KL of the models' own logits; and exports have the student's logits, a
custom one in a process without Transpoint, a native one in plain transformers. *TransMamba* says whether it can be
one, *exports* which formats hold a Mamba-2 student.

| family | TransMamba | exports |
|---|---|---|
{chr(10).join(rows)}

## Refused

Each with the reason that is printed. A family whose attention has other names, or its projections in one matrix, needs
a reader of a few lines: see `teachers/families.py`.

| family | reason |
|---|---|
{reasons}

Model types that are not in these tables were not tried: no tiny model of theirs could be made with the usual settings.
"""


def build_native(family):
    return convert(family, keep_attention=[1], qk_norm=False)[1]
