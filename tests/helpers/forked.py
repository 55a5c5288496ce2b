"""Several processes: of the command line, or of one function, forked from one that has imported everything.

`in_one(function)`, `in_two(function, ...)` and `run_all(jobs)` are for tests.
"""

import multiprocessing
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from run_files import ROOT
from transpoint.distill.run.threads import spin_briefly


def run_all(jobs: list[dict]) -> list[str]:
    """What the processes of each job printed; fails the test where one did not end well.

    A job is {"engine": a file of configs/accelerate, "arguments": [...], "log": file, "processes": 2}; the environment
    is what `accelerate launch` sets.
    """
    well = [_run(**job) for job in jobs]
    outputs = [Path(job["log"]).read_text() for job in jobs]
    assert all(well), "\n".join(output[-2000:] for output in outputs)
    return outputs


def _run(engine: str, arguments: list, log, processes: int = 2) -> bool:
    port = _free_port()
    with _server() as context:
        given = [(rank, processes, engine, port, list(map(str, arguments)), str(log)) for rank in range(processes)]
        children = [context.Process(target=_command, args=each) for each in given]
        for child in children:
            child.start()
        for child in children:
            child.join()
    return all(child.exitcode == 0 for child in children)


def _command(rank: int, processes: int, engine: str, port: int, arguments: list[str], log: str) -> None:
    from transpoint.distill.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.chdir(ROOT)
    _become(rank, processes, engine, port)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


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

    with _server():
        start_processes(
            _as_one_of_two, (engine, _free_port(), function, arguments), nprocs=2, start_method="forkserver"
        )


@contextmanager
def _server():
    """The process that forks, the same for all tests."""
    multiprocessing.set_forkserver_preload(["preload"])
    # It passes over what it does not find, and knows no sys.path but this. There may be one GPU only.
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", PYTHONPATH=paths, OMP_NUM_THREADS="1"):
        spin_briefly(os.environ)
        yield multiprocessing.get_context("forkserver")


def _become(rank: int, processes: int, engine: str, port: int) -> None:
    import torch

    os.environ.update(environment_of(engine, processes))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)


def _as_one_of_two(rank: int, engine: str, port: int, function, arguments: tuple) -> None:
    import torch

    _become(rank, 2, engine, port)
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
