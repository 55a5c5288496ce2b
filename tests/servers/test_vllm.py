"""Exports in vLLM, on a CPU: what it makes of the folder is what plain transformers makes of it."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transpoint.distill.export.write import export
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import byte_tokenizer, random_teacher

PYTHON = Path(__file__).parents[2] / ".venv-servers/bin/python"
TOKENS = 24
BLOCK = 128  # tokens whose states and keys vLLM keeps together, by its choice for models of this size
CHAT = [{"role": "user", "content": "What is a hybrid?"}]
WIDE = {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
BARE = {"norm": False, "conv_activation": None, "conv_kernel": 2, "gate_bias": False, "state_factor": 2}
EXPORTS = {
    "native": {},
    "native without attention": {"family": "qwen2", "keep": []},
    "native in bfloat16": {"dtype": torch.bfloat16},
    "custom": {"format": "custom", "family": "qwen3"},
    "custom without attention": {"format": "custom", "family": "qwen3", "keep": [], "options": {"expand_kv": True}},
    "custom without norm": {"format": "custom", "options": BARE, **WIDE},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.servers,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the servers' environment: make test-servers"),
]


def make(family="llama", keep=(1, 3), options=None, **sizes):
    """A student none of whose mixer parameters is zero, one, or the same in two places, of heads that vLLM's kernels
    for CPUs take."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64} | sizes
    teacher, _ = random_teacher(f"random-{family}", **sizes)
    student = build_student(teacher, StudentConfig(keep_attention=list(keep), **(options or {})))
    generator = torch.Generator().manual_seed(7)
    size = {"in_proj.weight": 0.08, "A_log": 0.8, "dt_bias": 0.8, "z_bias": 0.5, "D": 0.5, "norm.weight": 0.3}
    with torch.no_grad():
        for mixer in filter(None, student.mixer_layers()):
            for name, parameter in mixer.named_parameters():
                parameter.add_(size.get(name, 0.1) * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def prompts():
    """Two calls. The second one asks the longest prompt of the first again, and one that departs from it late."""
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    first = [ids(5), ids(64), ids(330)]
    return [first, [first[2], first[2][: 2 * BLOCK + 30] + ids(20)]]


def job(folder, dtype):
    engine = {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": 512,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "mamba_cache_mode": "align",
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": BLOCK,  # so that the longest prompt takes several passes, beside others' steps
        "max_num_seqs": 4,
    }
    return {"engine": engine, "calls": prompts(), "tokens": TOKENS, "chat": CHAT}


class Served:
    """What vLLM made of the prompts, and the folder in plain transformers, in float32."""

    def __init__(self, folder, found):
        self.calls, self.chat = found["calls"], found["chat"]
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def pairs(self):
        """Each prompt and what vLLM made of it."""
        return [
            (ids, answer)
            for call, answers in zip(prompts(), self.calls, strict=True)
            for ids, answer in zip(call, answers, strict=True)
        ]

    def greedy(self, ids, **options):
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 2, **options}
        return self.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()

    def said(self):
        """Every log-probability that vLLM gave: of the first call's prompts, of what it generated and the likeliest."""
        return torch.tensor([found for _, _, found in self._given()])

    @torch.no_grad()
    def expected(self, model=None):
        """The same of transformers', where the tokens are those that vLLM chose."""
        model = self.model if model is None else model
        wholes = [model(torch.tensor([ids + a["tokens"]])).logits[0].float().log_softmax(-1) for ids, a in self.pairs()]
        return torch.stack([wholes[number][place, token] for (number, place), token, _ in self._given()])

    @torch.no_grad()
    def regret(self):
        """How much likelier transformers finds another token than the one that vLLM chose, at most."""
        found = []
        for ids, answer in self.pairs():
            steps = self.model(torch.tensor([ids + answer["tokens"]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            found.append(steps.max(-1).values - steps[range(TOKENS), answer["tokens"]])
        return torch.cat(found).max().item()

    def reused(self):
        """Tokens of each prompt that were not computed again, by call."""
        return [[answer["cached"] for answer in call] for call in self.calls]

    def _given(self):
        for number, (ids, answer) in enumerate(self.pairs()):
            places = [*range(len(answer["prompt"])), *range(len(ids) - 1, len(ids) - 1 + len(answer["steps"]))]
            for place, step in zip(places, answer["prompt"] + answer["steps"], strict=True):
                for token, found in step.items():
                    yield (number, place), int(token), found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """All exports, in one process, which takes long to import vLLM."""
    scratch = tmp_path_factory.mktemp("served")
    jobs = {}
    for name, case in EXPORTS.items():
        case = dict(case)
        format, dtype = case.pop("format", "native"), case.pop("dtype", torch.float32)
        export(make(**case), byte_tokenizer(), scratch / name, format, dtype)
        jobs[name] = job(scratch / name, dtype)
    path = scratch / "jobs.json"
    path.write_text(json.dumps(jobs))
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    own |= {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment = {n: value for n, value in os.environ.items() if n not in ("PYTHONPATH", "OMP_NUM_THREADS")} | own
    command = [PYTHON, Path(__file__).with_name("in_vllm.py"), path]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Served(scratch / name, found) for name, found in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("name", [name for name, case in EXPORTS.items() if "dtype" not in case])
def test_tokens_and_log_probabilities_of_several_prompts_are_those_of_transformers(name, served):
    one = served[name]
    for ids, answer in one.pairs():
        assert answer["tokens"] == one.greedy(ids, min_new_tokens=TOKENS, eos_token_id=None)
        assert len(set(answer["tokens"])) > 3
    said = one.said()
    assert len(said) >= 5 * 5 * TOKENS + 5 + 64 + 330 - 3
    difference = (said - one.expected()).abs().max().item()
    assert 0 < difference < 5e-5


@pytest.mark.parametrize("name", [name for name in EXPORTS if name != "custom without norm"])
def test_what_begins_with_a_prompt_that_was_there_goes_on_from_its_state(name, served):
    """By whole blocks; the states of the one left out are larger, and so are its blocks: longer than the prompts."""
    assert served[name].reused() == [[0, 0, 0], [2 * BLOCK, 2 * BLOCK]]


@pytest.mark.parametrize("name", ["native", "custom"])
def test_a_chat_answer_is_that_of_transformers(name, served):
    one = served[name]
    ids = one.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert one.chat["prompt"] == ids
    assert one.chat["tokens"] == one.greedy(ids)
    text = one.tokenizer.decode(one.chat["tokens"], skip_special_tokens=True)
    assert one.chat["text"].rstrip("\N{REPLACEMENT CHARACTER}") == text.rstrip("\N{REPLACEMENT CHARACTER}") != ""


def test_a_native_student_without_attention_has_a_sentinel_layer(served):
    types = served["native without attention"].model.config.layer_types
    assert types == ["linear_attention"] * 4 + ["full_attention"]


def test_bfloat16_is_as_near_to_float32_as_transformers_own(served):
    """And a token that it chooses instead of the likeliest is nearly as likely."""
    one = served["native in bfloat16"]
    exact = one.expected()
    own = (one.expected(copy.deepcopy(one.model).to(torch.bfloat16)) - exact).abs()
    found = (one.said() - exact).abs()
    assert 1e-3 < found.mean() < min(0.05, 1.5 * own.mean())
    assert found.max() < min(0.4, 1.5 * own.max())
    assert one.regret() < 0.2
