"""Runs in the servers' environment, which has vLLM and no Transpoint: serves a folder, and writes down what came of it.

`python in_vllm.py JOB OUT`: JOB is a file {"engine": keyword arguments of `vllm.LLM`, "calls": for each one list of
prompts (token ids) that are generated from together, "tokens": how many, "chat": messages or None}. OUT becomes
{"calls": for each call and prompt {"tokens", "cached": prompt tokens that were reused, "prompt": for each prompt token
but the first {token id: log-probability}, "steps": the same for each generated token and the likeliest}, "chat":
{"prompt": token ids, "tokens", "text"} or None}.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main(job: str, out: str) -> None:
    with open(job) as file:
        given = json.load(file)
    engine = LLM(**given["engine"])
    found: dict = {"calls": [], "chat": None}
    for number, prompts in enumerate(given["calls"]):
        # Nothing is read from the prefix cache where the prompt's own log-probabilities are asked for.
        options = {"logprobs": 5, "prompt_logprobs": 0 if number == 0 else None}
        params = SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True, **options)
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        found["calls"].append([_written(answer) for answer in answers])
    if given["chat"] is not None:
        params = SamplingParams(temperature=0, max_tokens=given["tokens"])
        answer = engine.chat(given["chat"], params, use_tqdm=False)[0]
        said = answer.outputs[0]
        found["chat"] = {"prompt": answer.prompt_token_ids, "tokens": list(said.token_ids), "text": said.text}
    with open(out, "w") as file:
        json.dump(found, file)


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
