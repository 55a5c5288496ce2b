"""The plot of growth has a line for each name, and for the teacher what the decoding benchmark says of it."""

import json


def test_lines_are_of_all_files(load_script, tmp_path):
    training = [{"stage": "distill", "length": n, "tokens_per_second": 1e5} for n in (64, 128)]
    decoding = [
        {"model": model, "length": 64, "milliseconds": 2.0, "cache_bytes": 2**20} for model in ("teacher", "student")
    ]
    for name, records in (("training", training), ("decoding", decoding)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"records": records}))
    out = tmp_path / "growth.svg"
    line = f"half=1={tmp_path}/training.json,{tmp_path}/decoding.json"
    assert load_script("plot_growth").main([str(out), line]) == 0
    drawn = out.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("half=1", "teacher", "decoding, ms a token"))
