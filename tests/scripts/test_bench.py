"""The kernels' benchmark on tiny shapes: every op runs, what is wrong is found, and the page says what was measured."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from scripts.bench import floors
from scripts.bench.__main__ import main, slug
from scripts.bench.cases import Case, Maker
from scripts.bench.first_step import first_step
from scripts.bench.judge import OURS, TOLERANCE, best_peer, is_wrong, verdict
from scripts.bench.meter import Meter
from scripts.bench.peers import Call
from scripts.bench.rows import full
from scripts.bench.run import run_case
from scripts.bench.tables import BEGIN, END, table, write_table

QUICK = ["--quick", "--device", "cpu"]


def double(x):
    return 2 * x


def a_case(ours=double, peers=None):
    """y = 2 x of 8 rows, the last 4 checked."""
    return Case(
        op="double",
        shape="8,3",
        make=lambda: {"x": torch.randn(8, 3)},
        ours=ours,
        reference=double,
        peers=peers or {},
        costs=floors.elementwise_cost(24, inputs=1, size=4),
        leaves=("x",),
        sliced=("x",),
        cut=lambda t: t[-4:],
    )


def run(case):
    """The records of the forward pass, and of both."""
    return run_case(case, Meter("cpu", 1), {"bytes_per_s": 1e9, "flop_per_s": 1e9})


def test_every_op_runs_on_the_cpu(tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "kernels-cpu.json").read_text())
    ops = {record["op"] for record in report["records"]}
    assert ops == {
        "ssd_scan", "ssd_step", "delta_scan", "delta_step", "selective_scan", "selective_step", "causal_conv1d",
        "causal_conv1d_step", "gated_rms_norm", "linear_kl", "mixing_distance",
    }  # fmt: skip
    for record in report["records"]:
        assert record["results"][OURS]["eager_ms"] > 0
        assert all(error < TOLERANCE for error in record["errors"].values())
        of_torch = record["results"].get("PyTorch")  # one of the scans is measured without
        assert of_torch["error"] < TOLERANCE if of_torch else record["shape"] == "1,64,4,16,32, groups 1"
    page = (tmp_path / "kernels.md").read_text()
    assert "`python -m scripts.bench --device cpu --quick`" in page and str(tmp_path) not in page
    assert page.count("| ssd_scan | 2,96,4,16,16, kv 2 | forward |") == 1

    (tmp_path / "kernels.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--table", "--out", str(tmp_path)]) == 0
    again = (tmp_path / "kernels.md").read_text()
    assert again.startswith("before\n") and again.endswith("after\n") and "old" not in again
    assert page.strip() in again


def test_only_and_budget_choose_rows(capsys):
    assert main([*QUICK, "--only", "rms_norm", "--no-peers"]) == 0
    printed = capsys.readouterr().out
    assert "gated_rms_norm 64,96" in printed and "ssd_scan" not in printed and "PyTorch  " not in printed
    assert main([*QUICK, "--only", "rms_norm", "--budget", "0"]) == 0
    assert "Not run: gated_rms_norm 64,96, groups 3 (over budget)." in capsys.readouterr().out


def test_the_cpu_is_for_quick_runs(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "--quick" in capsys.readouterr().err


def test_full_rows_build():
    cases = full(Maker("cpu"))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        for name, targets in case.targets.items():
            assert name in case.costs
            for target in targets:
                assert target["of"] in ("floor", "memory", *case.peers)


@pytest.mark.parametrize(
    "cost, expected",
    [
        # Tensors of 8*4096*32*64 bf16 numbers are 134 MB: 4 forward, 7 more backward, and dt.
        (floors.scan_cost(8, 4096, 32, 64, 64, 32, 32, 32), {"forward": 0.126, "forward+backward": 0.347}),
        (floors.scan_cost(1, 65536, 32, 64, 128, 32, 8, 8), {"forward": 0.189, "forward+backward": 0.504}),
        (floors.scan_cost(8, 2048, 9, 64, 64, 9, 9, 9), {"forward": 0.0177, "forward+backward": 0.0487}),
        (floors.step_cost(64, 32, 64, 128, 32, 1, 1, 4), {"step": 0.0315}),
        (floors.elementwise_cost(8 * 4096 * 2304, 1), {"forward": 0.0705, "forward+backward": 0.176}),
        (floors.elementwise_cost(32768 * 2048, 2), {"forward": 0.094, "forward+backward": 0.251}),
        (floors.kl_cost(8192, 576, 576, 49152), {"forward+backward": 2.35}),
        (floors.kl_cost(8192, 2048, 2048, 128256), {"forward+backward": 21.8}),
    ],
)
def test_floors(cost, expected):
    rates = {"bytes_per_s": 4.28e12, "flop_per_s": 790e12}
    assert {name: floors.floor_ms(c, rates) for name, c in cost.items()} == pytest.approx(expected, rel=0.01)


def test_scan_floor_counts_operations():
    """One token of one head, by hand."""
    P, N, Q = 64, 128, 64
    forward = 2 * Q * N + 2 * Q * P + 2 * 2 * N * P
    backward = 3 * 2 * Q * N + 2 * 2 * Q * P + 4 * 2 * N * P
    cost = floors.scan_cost(1, 1, 1, P, N, 1, 1, 1)
    assert cost["forward"][1] == forward and cost["forward+backward"][1] == forward + backward


def test_what_fails_is_reported():
    def refuses(t):
        raise RuntimeError("not on | this GPU\nand a long story")

    def missing(t):
        import no_such_package  # noqa: F401

    peers = {"refuses": refuses, "missing": missing, "fine": lambda t: Call(lambda: double(t["x"]))}
    forward, _ = run(a_case(peers={**peers, "PyTorch": peers["fine"]}))
    results = forward["results"]
    assert results["refuses"] == {"refuses": "not on / this GPU"}
    assert results["missing"] == {"refuses": "not installed (no_such_package)"}
    assert results["fine"]["error"] < 1e-6 and results["fine"]["eager_ms"] > 0
    assert best_peer(forward)[0] in ("fine", "PyTorch")
    assert not is_wrong(forward)


def test_ours_failing_is_wrong_and_reported():
    def broken(x):
        raise ValueError("no such shape")

    forward, both = run(a_case(ours=broken))
    assert is_wrong(forward) and is_wrong(both)
    assert forward["results"][OURS]["refuses"] == "no such shape"
    report = {"gpu": "X", "command": "", "versions": {}, "skipped": [], "records": [forward, both]}
    report["ceilings"] = {"bytes_per_s": 1e12, "flop_per_s": 1e12}
    assert "no such shape" in table(report)


@pytest.mark.parametrize(
    "ours, errors",
    [
        (lambda x: 2 * x + 0.1 * x.detach(), {"y"}),
        (lambda x: (2 * x).detach() + 2.1 * (x - x.detach()), {"dx"}),
        (lambda x: 2 * x + 0.5 * (x - x.detach()).flip(0), {"dx"}),  # a gradient outside the slice
        (lambda x: torch.where(torch.arange(8)[:, None] < 1, math.nan, 2 * x), {"y"}),  # NaN outside the slice
    ],
)
def test_wrong_values_and_gradients_are_found(ours, errors):
    forward, both = run(a_case(ours))
    assert {name for name, error in both["errors"].items() if not error < TOLERANCE} == errors
    assert is_wrong(both)


def test_a_peer_of_something_else_is_no_measure():
    peers = {"PyTorch": lambda t: Call(lambda: 3 * t["x"])}
    forward, _ = run(a_case(peers=peers))
    assert forward["results"]["PyTorch"]["error"] == pytest.approx(0.5)
    assert best_peer(forward) == (None, None)


def test_targets():
    record = {
        "floor_ms": 1.0,
        "targets": [
            {"of": "mamba_ssm", "times": 4, "mode": "graph"},
            {"of": "mamba_ssm", "times": 4, "mode": "eager"},
            {"of": "floor", "within": 1.4},
            {"of": "memory", "mb": 400},
            {"of": "fla core", "times": 1, "mode": "graph"},
        ],
        "results": {
            OURS: {"graph_ms": 1.25, "eager_ms": 2.0, "peak_mb": 401},
            "mamba_ssm": {"graph_ms": 5.0, "eager_ms": 6.0},
            "fla core": {"refuses": "no"},
        },
    }
    texts, met = zip(*(verdict(record, target) for target in record["targets"]), strict=True)
    assert met == (True, False, True, False, None)
    assert texts[0] == "4 x mamba_ssm: 4.00" and texts[4] == "1 x fla core: not measured"


def test_best_peer_leaves_out_context():
    results = {
        OURS: {"graph_ms": 1.0},
        "attention, cuDNN": {"graph_ms": 0.1, "eager_ms": 0.1},
        "a": {"graph_ms": 3.0, "eager_ms": 3.5},
        "b": {"eager_ms": 2.0, "graph_refuses": "waits"},
    }
    assert best_peer({"results": results}) == ("b", 2.0)


def test_names_of_gpus():
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100"
    assert slug("CPU") == "cpu"


def test_a_page_without_markers_is_kept(tmp_path):
    (tmp_path / "kernels.md").write_text("mine")
    with pytest.raises(ValueError, match="expected the lines"):
        write_table(tmp_path)
    assert (tmp_path / "kernels.md").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy, of what is imported
def test_first_step_of_a_new_process(monkeypatch):
    """The command that each process gets runs a training step; here in this process, which has all imported."""
    folders = []

    def process(command, *, cwd, env, **options):
        assert command[:2] == [sys.executable, "-m"] and (Path(cwd) / "scripts" / "bench" / "__main__.py").exists()
        assert env.keys() >= os.environ.keys() and not os.listdir(env["TRITON_CACHE_DIR"])
        folders.append(env["TRITON_CACHE_DIR"])
        printed = io.StringIO()
        monkeypatch.setattr(sys, "argv", ["bench", *command[3:]])
        with redirect_stdout(printed), pytest.raises(SystemExit) as end:
            runpy.run_module(command[2], run_name="__main__")
        return subprocess.CompletedProcess(command, end.value.code, printed.getvalue())

    monkeypatch.setattr(subprocess, "run", process)
    seconds = first_step("cpu")
    assert set(seconds) == {"compiling", "cached"} and all(0 < s < 60 for s in seconds.values())
    assert folders[0] == folders[1]  # the second finds what the first compiled
