"""The decoding benchmark on a tiny model: it runs, and its figures are those of the caches."""

import json

import pytest


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench_decoding")


def test_quick(bench, tmp_path, capsys):
    assert bench.main(["--quick", "--json", str(tmp_path / "results" / "decoding.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "decoding.json").read_text())
    assert found["trans_points"] == ["32"] * 4 and found["device"] == "CPU"
    shapes = [(r["batch"], r["length"], r["model"]) for r in found["records"]]
    assert shapes == [(b, n, model) for b in (1, 2) for n in (64, 256) for model in ("teacher", "student")]
    layers, heads, kv_heads, head_dim = 4, 4, 2, 16
    for record in found["records"]:
        of_teacher = layers * record["length"] * 2 * kv_heads * head_dim * 4
        of_student = layers * heads * head_dim**2 * 4
        assert record["cache_bytes"] == record["batch"] * (of_teacher if record["model"] == "teacher" else of_student)
        assert record["tokens_per_second"] == pytest.approx(1e3 * record["batch"] / record["milliseconds"])
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 and all(row.count("|") == 11 for row in rows)
    assert rows[2].startswith("| 256 | 1 | ") and "| 0.2 | 0.0 | 16.00 | - | - |" in rows[2]


def test_ratios_are_of_the_student_to_the_teacher(bench):
    common = {"length": 10, "batch": 1}
    teacher = common | {"tokens_per_second": 10.0, "cache_bytes": 4 * 2**20, "peak_bytes": 3 * 2**20}
    student = common | {"tokens_per_second": 30.0, "cache_bytes": 2 * 2**20, "peak_bytes": 2**20}
    assert bench.row(teacher, student) == "| 10 | 1 | 10 | 30 | 3.00 | 4.0 | 2.0 | 2.00 | 3 | 1 |"
