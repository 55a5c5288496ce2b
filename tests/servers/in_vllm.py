"""Runs in the servers' environment, which has vLLM and no Transpoint: serves folders, and writes down what came of it.

`python in_vllm.py JOBS`: a file {name: job}, one engine each. A job is {"engine": keyword arguments of `vllm.LLM`,
"calls": for each one list of prompts (token ids) that are generated from together, "tokens": how many, "chat": messages
or None}. JOBS becomes {name: {"calls": for each call and prompt {"tokens", "cached": prompt tokens that were reused,
"prompt": for each prompt token but the first {token id: log-probability}, "steps": the same for each generated token
and the likeliest}, "chat": {"prompt": token ids, "tokens", "text"} or None}}.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def main(path: str) -> None:
    jobs = json.loads(Path(path).read_text())
    done = {}
    for name, job in jobs.items():
        done[name] = _serve(LLM(**job["engine"]), job)
        cleanup_dist_env_and_memory()
    Path(path).write_text(json.dumps(done))


def _serve(engine: LLM, job: dict) -> dict:
    calls, chat = [], None
    for number, prompts in enumerate(job["calls"]):
        # Nothing is read from the prefix cache where the prompt's own log-probabilities are asked for.
        options = {"logprobs": 5, "prompt_logprobs": 0 if number == 0 else None}
        params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, **options)
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        calls.append([_written(answer) for answer in answers])
    if job["chat"] is not None:
        params = SamplingParams(temperature=0, max_tokens=job["tokens"])
        answer = engine.chat(job["chat"], params, use_tqdm=False)[0]
        said = answer.outputs[0]
        chat = {"prompt": answer.prompt_token_ids, "tokens": list(said.token_ids), "text": said.text}
    return {"calls": calls, "chat": chat}


def _written(answer) -> dict:
    said = answer.outputs[0]
    return {
        "tokens": list(said.token_ids),
        "cached": answer.num_cached_tokens,
        "prompt": [_by_token(step) for step in (answer.prompt_logprobs or [])[1:]],
        "steps": [_by_token(step) for step in said.logprobs],
    }


def _by_token(step: dict) -> dict[int, float]:
    return {token: one.logprob for token, one in step.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
