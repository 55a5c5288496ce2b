"""Processes that have imported no part of Transpoint, as those who have only transformers start them, but forked.

`run(command, ...)` is `subprocess.run` of [python, "-c", code, *arguments] with its output captured as text, without
the seconds that importing torch and transformers takes each time. This file is what forks: it reads a job a line.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


def run(command, *, cwd, env, **options) -> subprocess.CompletedProcess:
    python, flag, code, *arguments = map(str, command)
    assert (python, flag) == (sys.executable, "-c")
    assert options.items() <= {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}.items(), options
    with tempfile.TemporaryDirectory() as scratch:
        job = {"code": code, "arguments": arguments, "cwd": str(cwd), "environment": dict(env), "scratch": scratch}
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        output = [Path(scratch, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, returncode, *output)


@functools.cache
def _server() -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.communicate)  # which closes its input: it ends with its jobs
    return server


def _do(job: dict) -> None:
    """In a forked process: becomes `python -c code *arguments`."""
    import transformers.dynamic_module_utils

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['scratch']}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if modules := job["environment"].get("HF_MODULES_CACHE"):  # was read at import
        transformers.dynamic_module_utils.HF_MODULES_CACHE = modules
    sys.argv, sys.path[0] = ["-c", *job["arguments"]], ""
    exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _do(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    gc.disable()  # its children end soon
    with contextlib.redirect_stdout(sys.stderr):  # it says something
        import deepspeed  # noqa: F401 - accelerate asks for it where a model is saved
    import torch
    import transformers.models.granitemoehybrid.modeling_granitemoehybrid
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # a thousand patterns are compiled for the first model that is loaded
    assert "transpoint" not in sys.modules
    torch.set_num_threads(1)
    _serve()
