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


class Served:
    """A folder, what vLLM made of the prompts, and the folder in plain transformers, in float32."""

    def __init__(self, folder, scratch, dtype="float32", chat=None):
        self.calls = prompts()
        engine = {
            "model": str(folder),
            "dtype": dtype,
            "max_model_len": 512,
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "mamba_cache_mode": "align",
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": BLOCK,  # so that the longest prompt takes several passes, beside others' steps
            "max_num_seqs": 4,
        }
        (scratch / "job.json").write_text(
            json.dumps({"engine": engine, "calls": self.calls, "tokens": TOKENS, "chat": chat})
        )
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "OMP_NUM_THREADS")} | own
        command = [PYTHON, Path(__file__).with_name("in_vllm.py"), scratch / "job.json", scratch / "found.json"]
        environment |= {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
        done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        self.found = json.loads((scratch / "found.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def pairs(self):
        """Each prompt and what vLLM made of it."""
        return [
            (ids, answer)
            for call, answers in zip(self.calls, self.found["calls"], strict=True)
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

    def _given(self):
        for number, (ids, answer) in enumerate(self.pairs()):
            places = [*range(len(answer["prompt"])), *range(len(ids) - 1, len(ids) - 1 + len(answer["steps"]))]
            for place, step in zip(places, answer["prompt"] + answer["steps"], strict=True):
                for token, found in step.items():
                    yield (number, place), int(token), found


def served(folder, scratch, student, format="native", dtype=torch.float32, **options):
    export(student, byte_tokenizer(), folder, format, dtype)
    return Served(folder, scratch, str(dtype).removeprefix("torch."), **options)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("hybrid")
    return served(scratch / "out", scratch, make(), chat=CHAT)


@pytest.fixture(scope="module")
def all_mamba(tmp_path_factory):
    """With an attention layer that adds nothing, and the biases of qwen2."""
    scratch = tmp_path_factory.mktemp("all_mamba")
    return served(scratch / "out", scratch, make("qwen2", keep=[]))


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("bfloat16")
    return served(scratch / "out", scratch, make(), dtype=torch.bfloat16)


def assert_same(served):
    for ids, answer in served.pairs():
        assert answer["tokens"] == served.greedy(ids, min_new_tokens=TOKENS, eos_token_id=None)
        assert len(set(answer["tokens"])) > 3
    difference = (served.said() - served.expected()).abs().max().item()
    assert 0 < difference < 5e-5
    assert len(served.said()) >= 5 * 5 * TOKENS + 5 + 64 + 330 - 3


def assert_reused(served):
    """Both prompts of the second call start from what the first left: blocks of 128 tokens that are whole."""
    first, second = served.found["calls"]
    assert [answer["cached"] for answer in first] == [0, 0, 0]
    assert [answer["cached"] for answer in second] == [2 * BLOCK, 2 * BLOCK]


def test_tokens_and_log_probabilities_of_several_prompts_are_those_of_transformers(hybrid):
    assert_same(hybrid)


def test_what_begins_with_a_prompt_that_was_there_is_read_from_the_cache(hybrid):
    assert_reused(hybrid)


def test_a_chat_answer_is_that_of_transformers(hybrid):
    ids = hybrid.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    answer = hybrid.found["chat"]
    assert answer["prompt"] == ids
    assert answer["tokens"] == hybrid.greedy(ids)
    assert answer["text"] == hybrid.tokenizer.decode(answer["tokens"], skip_special_tokens=True) != ""


def test_a_student_without_attention_is_served_with_its_sentinel_layer(all_mamba):
    assert all_mamba.model.config.layer_types[-1] == "full_attention"
    assert_same(all_mamba)
    assert_reused(all_mamba)


def test_bfloat16_is_as_near_to_float32_as_transformers_own(bfloat16):
    """And a token that it chooses instead of the likeliest is nearly as likely."""
    exact = bfloat16.expected()
    own = (bfloat16.expected(copy.deepcopy(bfloat16.model).to(torch.bfloat16)) - exact).abs()
    found = (bfloat16.said() - exact).abs()
    assert 1e-3 < found.mean() < min(0.05, 1.5 * own.mean())
    assert found.max() < min(0.4, 1.5 * own.max())
    assert bfloat16.regret() < 0.2
    assert_reused(bfloat16)
