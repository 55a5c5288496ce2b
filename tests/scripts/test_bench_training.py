"""The training benchmark on a tiny model: it runs every stage and mixer, and its figures belong together."""

import json

import pytest


@pytest.fixture(scope="module")
def bench(load_script):
    return load_script("bench_training")


@pytest.mark.parametrize("mixer", ["mamba2", "transmamba"])
def test_quick(mixer, bench, tmp_path, capsys):
    path = tmp_path / "results" / "training.json"
    assert bench.main(["--quick", "--mixer", mixer, "--trans-points", "uniform:16", "--json", str(path)]) == 0
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found["mixer"] == mixer and found["device"] == "CPU" and found["processes"] == 1
    shapes = [(record["batch"], record["stage"]) for record in found["records"]]
    assert shapes == [(batch, stage) for batch in (1, 2) for stage in ("align", "distill")]
    for record in found["records"]:
        assert record["tokens_per_second"] == pytest.approx(record["batch"] * 64 / record["step_ms"] * 1e3)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 and all(row.count("|") == 10 for row in rows)
