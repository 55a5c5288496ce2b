"""Several processes: of the command line, without importing everything in each, or of one function.

`in_one(function)`, `in_two(function, ...)` and `run_all(jobs)` are for tests. The last runs this file in a process of
its own: python forked.py < jobs.json. Each job is {"engine": a file of configs/accelerate, "arguments": [...], "log":
file, "processes": 2}; the environment is what `accelerate launch` sets.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

from run_files import ROOT
from transpoint.distill.run.threads import spin_briefly


def run_all(jobs: list[dict]) -> list[str]:
    """What the processes of each job printed; fails the test where one did not end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    spin_briefly(environment)
    text = json.dumps([{**job, "log": str(job["log"]), "arguments": list(map(str, job["arguments"]))} for job in jobs])
    done = subprocess.run(
        [sys.executable, __file__], input=text, text=True, cwd=ROOT, env=environment, capture_output=True
    )
    outputs = [Path(job["log"]).read_text() for job in jobs]
    assert done.returncode == 0, "\n".join([done.stderr[-2000:], *(output[-2000:] for output in outputs)])
    return outputs


def in_one(function) -> int:
    """Calls function() in a process forked from this one; its exit code, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)  # whatever happens: nothing of the tests goes on in there
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_two(function, *arguments, engine: str = "ddp") -> None:
    """Calls function(rank, *arguments) in two processes that may make a group of two with gloo.

    engine: a file of configs/accelerate, for `make_accelerator`.
    """
    from torch.multiprocessing import start_processes

    multiprocessing.set_forkserver_preload(["preload"])
    # The server that forks passes over what it does not find, and knows no sys.path but this.
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=paths):  # there may be one GPU only
        spin_briefly(os.environ)
        given = (engine, _free_port(), function, arguments)
        start_processes(_as_one_of_two, given, nprocs=2, start_method="forkserver")


def _as_one_of_two(rank: int, engine: str, port: int, function, arguments: tuple) -> None:
    import torch

    os.environ.update(environment_of(engine, 2))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment_of(engine: str, processes: int) -> dict[str, str]:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    words = ["--config_file", str(file), "--num_processes", str(processes), "train.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


def _fork(job: dict) -> bool:
    from transpoint.distill.cli import main

    processes = job.get("processes", 2)
    environment = environment_of(job["engine"], processes)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            code = main(job["arguments"])
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    return all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)


if __name__ == "__main__":
    import preload  # noqa: F401 - here, and not in every child

    os._exit(0 if all([_fork(job) for job in json.load(sys.stdin)]) else 1)  # without a second for tidying up
