"""One question, answered by transformers, vLLM and llama.cpp from two exports of one student, side by side.

    python scripts/answers.py NATIVE GGUF "What is the capital of France?"

NATIVE and GGUF: folders, or `-` to leave out what loads them. Each program makes the prompt by itself, from the chat
template that the export carries, and answers greedily, in a process of its own. vLLM is that of the environment which
`make test-servers` makes, or of --vllm. Exits with 1 where answers differ, with 2 where there are none to compare.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
found = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1]:]
answer = tokenizer.decode(found, skip_special_tokens=True)
"""
VLLM = """
from vllm import LLM, SamplingParams
engine = LLM(path, dtype="float32", enforce_eager=True)
answer = engine.chat(messages, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)[0].outputs[0].text
"""
LLAMA_CPP = """
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_gpu_layers = path, 2048, 0
server = xllamacpp.Server(settings)
asked = {"messages": messages, "temperature": 0, "max_tokens": tokens}
answer = server.handle_chat_completions(asked)["choices"][0]["message"]["content"]
"""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    gguf = options.gguf if options.gguf == "-" else str(Path(options.gguf) / "model.gguf")
    programs = {
        "transformers": (TRANSFORMERS, options.native, sys.executable),
        "vLLM": (VLLM, options.native, options.vllm),
        "llama.cpp": (LLAMA_CPP, gguf, sys.executable),
    }
    answers = {}
    for name, (code, path, python) in programs.items():
        if path == "-" or not Path(python).exists():
            print(f"{name}: left out")
            continue
        answers[name] = ask(python, code, path, options.question, options.tokens)
        print(f"{name}: {answers[name]}", flush=True)
    if len(answers) < 2:
        print("nothing to compare")
        return 2
    return int(len(set(answers.values())) > 1)


def ask(python: str, code: str, path: str, question: str, tokens: int) -> str:
    """The answer to a question. Raises RuntimeError where the program ends with an error."""
    given = {"path": os.path.abspath(path), "messages": [{"role": "user", "content": question}], "tokens": tokens}
    asked = f"import json, sys\nglobals().update(json.loads(sys.argv[1]))\n{code}\nprint('\\n' + json.dumps(answer))"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [os.path.abspath(python), "-c", asked, json.dumps(given)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    return json.loads(lines[-1]).strip().strip("\N{REPLACEMENT CHARACTER}")  # half a character, where the tokens end


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("native", metavar="NATIVE", help="a native export, or -")
    parser.add_argument("gguf", metavar="GGUF", help="a gguf export, or -")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--tokens", type=int, default=48, help="at most (default: 48)")
    parser.add_argument("--vllm", default=".venv-servers/bin/python", help="a Python that has vLLM")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
