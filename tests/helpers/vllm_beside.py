"""Serves exports by vLLM in the servers' environment, and compares what came of it with plain transformers."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PYTHON = Path(__file__).parents[2] / ".venv-servers/bin/python"
TOKENS = 24
BLOCK = 128  # tokens whose states and keys vLLM keeps together, by its choice for models of this size
CHAT = [{"role": "user", "content": "What is a hybrid?"}]

needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="needs the servers' environment: make test-servers")
TORCHVISION = any(PYTHON.parents[1].glob("lib/*/site-packages/torchvision"))  # vLLM's Qwen3.5 imports it
needs_torchvision = pytest.mark.skipif(not TORCHVISION, reason="the servers' environment has no torchvision")


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

    def worst(self, differences):
        """For a message: how many log-probabilities are further than usual from transformers', and which most."""
        given = [where for where, _, _ in self._given()]
        order = differences.argsort(descending=True)[:8].tolist()
        largest = [f"{differences[i]:.1e} of prompt {given[i][0]} at {given[i][1]}" for i in order]
        return f"{int((differences > 5e-5).sum())} of {len(given)} are further than 5e-5: {', '.join(largest)}"

    @torch.no_grad()
    def regret(self):
        """How much likelier transformers finds another token than the one that vLLM chose, at most."""
        found = []
        for ids, answer in self.pairs():
            steps = self.model(torch.tensor([ids + answer["tokens"]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            found.append(steps.max(-1).values - steps[range(TOKENS), answer["tokens"]])
        return torch.cat(found).max().item()

    def assert_as_near_as_bfloat16(self, worst=1.5):
        """To float32 as transformers in bfloat16; and a token chosen instead of the likeliest is nearly as likely.

        Returns the largest difference of each, of which the first is at most `worst` times the second.
        """
        exact = self.expected()
        own = (self.expected(copy.deepcopy(self.model).to(torch.bfloat16)) - exact).abs()
        found = (self.said() - exact).abs()
        assert 1e-3 < found.mean() < min(0.05, 1.5 * own.mean()), (found.mean(), own.mean())
        assert found.max() < min(0.4, worst * own.max()), (found.max(), own.max())
        assert self.regret() < 0.2
        return found.max().item(), own.max().item()

    def reused(self):
        """Tokens of each prompt that were not computed again, by call."""
        return [[answer["cached"] for answer in call] for call in self.calls]

    def _given(self):
        for number, (ids, answer) in enumerate(self.pairs()):
            places = [*range(len(answer["prompt"])), *range(len(ids) - 1, len(ids) - 1 + len(answer["steps"]))]
            for place, step in zip(places, answer["prompt"] + answer["steps"], strict=True):
                for token, found in step.items():
                    yield (number, place), int(token), found


def serve(folders, scratch):
    """What vLLM makes of exports, {name: (folder, dtype)}, in one process, which takes long to import it."""
    jobs = {name: job(folder, dtype) for name, (folder, dtype) in folders.items()}
    path = scratch / "jobs.json"
    path.write_text(json.dumps(jobs))
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    own |= {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment = {n: value for n, value in os.environ.items() if n not in ("PYTHONPATH", "OMP_NUM_THREADS")} | own
    command = [PYTHON, Path(__file__).parents[1] / "servers" / "in_vllm.py", path]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Served(folders[name][0], found) for name, found in json.loads(path.read_text()).items()}
