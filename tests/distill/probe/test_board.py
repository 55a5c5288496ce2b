"""The experiment of Othello, small; and its scores, on what is known."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from transpoint.distill.cli import main
from transpoint.distill.probe.board import legality, majority, othello, probe_moves, settings_of
from transpoint.distill.probe.othello import random_games, replayed

TINY = "steps=3 batch_size=4 games=12 layers=2 width=16 heads=2 probe_games=60".split()


class Knows(torch.nn.Module):
    """Predicts the legal moves of its games, or all others."""

    device = torch.device("cpu")

    def __init__(self, games, right):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 70})
        self.legal, self.right = torch.from_numpy(replayed(games)[1] == right).float(), right

    def forward(self, ids, use_cache):
        return type("Output", (), {"logits": torch.nn.functional.pad(self.legal, (0, 6))})


@pytest.mark.parametrize("right", [True, False])
def test_the_share_of_legal_moves_is_1_or_0_of_one_that_knows_them(right):
    games = random_games(20, 0)
    found = legality(Knows(games, right), games)
    assert found["legal"] == pytest.approx(float(right)) and 0.1 < found["chance"] < 0.5


def test_without_a_model_the_moves_tell_which_squares_are_empty_but_not_whose_discs_are():
    fit, test = random_games(60, 0), random_games(30, 1)
    most, moves = majority(fit, test), probe_moves(fit, test)
    assert 0.5 < most["discs"] < 0.75 and 0.5 < moves["discs"] < 0.85
    assert moves["squares"] > most["squares"] and majority(fit, fit)["squares"] > most["squares"]


@pytest.mark.slow
def test_a_transformer_has_no_states_that_are_probed(tmp_path):
    settings = settings_of(["mixer=attention", *TINY, "layers=1", "probe_games=4"])
    found = othello(settings, tmp_path, Console(quiet=True))
    assert [part["state"] for part in found["trained"]] == [None] and found["trained"][0]["hidden"]["squares"] > 0


@pytest.mark.slow
def test_the_command_trains_probes_and_takes_the_model_that_is_there(tmp_path, capsys):
    words = ["probe", "othello", *TINY, "--out", str(tmp_path)]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "probe.json").read_text())
    assert 0 <= found["legal"] <= 1 and len(found["trained"]) == len(found["untrained"]) == 2
    assert np.isfinite([part[kind]["squares"] for part in found["untrained"] for kind in ("hidden", "state")]).all()
    assert found["trained"] != found["untrained"]
    lines = (tmp_path / "train" / "metrics.jsonl").read_bytes()
    assert main(words) == 0
    assert (tmp_path / "train" / "metrics.jsonl").read_bytes() == lines
    assert json.loads((tmp_path / "probe.json").read_text()) == found
    assert "Whose a disc is, read off states" in (tmp_path / "probe.html").read_text()
