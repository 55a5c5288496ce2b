"""The comparison of annealing, with hardly any training: it runs, and its columns are different trainings."""

import pytest


@pytest.mark.slow
def test_a_row_for_a_setting_and_a_seed(load_script, capsys):
    script = load_script("compare_annealing")
    script.SETTINGS = script.SETTINGS[-1:]
    assert script.main(["--seeds", "0", "--steps", "2", "--teacher-steps", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines[1:]]
    assert [row[:3] for row in rows] == [["0, 16, 32, 64 cycled", "3e-3", "0"]]
    assert all(float(plain) > 0 and plain != annealed for *_, plain, annealed in rows)
