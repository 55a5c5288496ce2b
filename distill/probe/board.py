"""Whether a model that has only seen moves of Othello knows the board (arXiv 2210.13382), and where it keeps it.

A model learns random games move by move, from scratch. Then linear probes read each square, empty or with a disc of who
moves next or of the other ("mine" and "yours": arXiv 2309.00941), off its hidden states, as these papers do for
Transformers, and off the states of its mixers.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from ...students import HybridForCausalLM, StudentConfig, untrained
from ...students.modeling.configuration_mixers import is_attention
from ..errors import RunError
from ..models import load_model, on_device
from ..objectives import LanguageModeling
from ..run.folder import StageFolder
from ..settings import TrainConfig
from ..train.trainer import train
from .linear import Ridge, sketched
from .othello import MOVES, SQUARES, random_games, replayed
from .reading import hidden_of, states_of

ROWS = 50  # games that are read at once
SEEDS = {"train": 0, "fit": 10**6, "test": 2 * 10**6}  # added to that of the experiment, for games of each use


@dataclass(frozen=True)
class Othello:
    """An experiment.

    mixer: of all layers; "attention": none is converted. games: to train on, each once unless there are fewer than
    steps * batch_size. probe_games: that probes are fitted to; half as many are measured on.
    """

    mixer: str = "mamba2"
    layers: int = 4
    width: int = 64
    heads: int = 4
    steps: int = 1200
    batch_size: int = 32
    games: int = 38_400
    lr: float = 3e-3
    probe_games: int = 400
    seed: int = 0


def settings_of(words: list[str]) -> Othello:
    """Of words KEY=VALUE. Raises RunError for what is no setting."""
    kinds: dict[str, type] = {name: type(value) for name, value in asdict(Othello()).items()}
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds:
            raise RunError(f"othello has no setting '{name}': expected one of {', '.join(kinds)}")
        try:
            found[name] = kinds[name](value)
        except ValueError as error:
            raise RunError(f"{name}: expected a number, got '{value}'") from error
    return Othello(**found)


class Games:
    """Games as training data, in the order in which they were drawn; no two documents in a row."""

    tokens_per_item = MOVES

    def __init__(self, games: np.ndarray):
        self.games = _ids(games)

    def batch(self, step: int, batch_size: int, seed: int, slots: range) -> list[dict[str, Tensor]]:
        return [self._item(step * batch_size + slot) for slot in slots]

    def spread(self, count: int) -> list[dict[str, Tensor]]:
        return [self._item(index) for index in range(count)]

    def _item(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.games[index % len(self.games)], "position_ids": torch.arange(MOVES)}


def othello(settings: Othello, out: Path, console: Console) -> dict:
    """Trains a model in the folder `out`, or goes on, or takes the one that is there; and probes it.

    Returns:
        settings; `legal`, how often its most likely move is a legal one, and `chance`, how often a random square of
        those that are empty is; `majority`, `moves` (a probe of the moves themselves) and, for `trained` and
        `untrained`, by layer `hidden` and `state` (None where there is none): the share of squares that are right, all
        of them and of those with a disc.

    Raises:
        StudentError, TeacherError: there is no such model.
    """
    accelerator = Accelerator(mixed_precision="no")
    model = cast(HybridForCausalLM, on_device(_model(settings), accelerator.device))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = _trained(settings, model, out, accelerator, console)
    fit, test = (random_games(n, settings.seed + SEEDS[use]) for use, n in _probed(settings).items())
    found: dict = {"settings": asdict(settings), "parameters": sum(p.numel() for p in model.parameters())}
    found |= legality(model, test)
    console.print(f"legal moves: {found['legal']:.1%}, of any empty square {found['chance']:.1%}", highlight=False)
    found["majority"], found["moves"] = majority(fit, test), probe_moves(fit, test)
    found["trained"] = probe_board(model, fit, test)
    model.load_state_dict(start)
    found["untrained"] = probe_board(model, fit, test)
    return found


def legality(model: PreTrainedModel, games: np.ndarray) -> dict[str, float]:
    """How often the most likely next move is legal; and how often one of all empty squares is."""
    boards, legal = replayed(games)
    right, chance = 0.0, 0.0
    for first in range(0, len(games), ROWS):
        rows = slice(first, first + ROWS)
        with torch.no_grad():
            best = model(_ids(games[rows]).to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        may = torch.from_numpy(legal[rows, :-1])
        right += (F.pad(may, (0, model.config.vocab_size - SQUARES)).gather(-1, best[..., None])).float().sum().item()
        chance += (may.sum(-1) / torch.from_numpy(boards[rows, :-1] == 0).sum(-1)).sum().item()
    count = len(games) * (MOVES - 1)
    return {"legal": right / count, "chance": chance / count}


class _Score:
    """Shares of squares that are right: of all, and for squares with a disc whether it is mine or yours."""

    def __init__(self):
        self.right = self.count = self.colour = self.discs = 0

    def add(self, values: Tensor, board: Tensor) -> None:
        """values (n, 64, 3): the largest one is what is expected. board (n, 64): 0, 1 or 2."""
        disc = board > 0
        self.right += int((values.argmax(-1) == board).sum())
        self.colour += int(((values[..., 1:].argmax(-1) + 1 == board) & disc).sum())
        self.count, self.discs = self.count + board.numel(), self.discs + int(disc.sum())

    def shares(self) -> dict[str, float]:
        return {"squares": self.right / self.count, "discs": self.colour / self.discs}


def majority(fit: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """What is right of each square and move number where the most frequent content is expected."""
    seen, boards = (torch.from_numpy(replayed(games)[0]).long() for games in (fit, test))
    counts = F.one_hot(seen, 3).sum(0).float()  # (moves, 64, 3)
    score = _Score()
    score.add(counts.expand(len(boards), -1, -1, -1), boards)
    return score.shares()


def probe_moves(fit: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """What a linear probe reads off the moves themselves: by whom each square was taken, if nobody had to pass."""

    def features(games: np.ndarray) -> Tensor:
        taken = F.one_hot(_ids(games), SQUARES).float()  # (n, moves, 64)
        sign = 1 - 2 * (torch.arange(MOVES) % 2)
        # Who moves next has taken those of two moves ago, four moves ago, ...
        signed = -sign[:, None] * (taken * sign[:, None]).cumsum(1)
        return torch.cat((taken.cumsum(1), signed), -1)

    return _probed_by(lambda games: {0: features(games)}, fit, test)[0]


def probe_board(model: PreTrainedModel, fit: np.ndarray, test: np.ndarray) -> list[dict]:
    """For each layer what is right of the board, read off its hidden states and off its state."""

    def ids(games: np.ndarray) -> Tensor:
        return _ids(games).to(model.device)

    def states(games: np.ndarray) -> dict[int, Tensor]:
        steps = [{i: sketched(t).clone() for i, t in held.items()} for held in states_of(model, ids(games))]
        return {i: torch.stack([held[i] for held in steps], 1) for i in steps[0]}

    hidden = _probed_by(lambda games: dict(enumerate(hidden_of(model, ids(games)))), fit, test)
    state = _probed_by(states, fit, test)
    return [{"hidden": hidden[layer], "state": state.get(layer)} for layer in sorted(hidden)]


def _probed_by(read, fit: np.ndarray, test: np.ndarray) -> dict[int, dict[str, float]]:
    """What is right of the boards of `test` where probes are fitted to those of `fit`, for each of the features
    (n, moves, F) that `read` makes of games."""
    probes: dict[int, Ridge] = {}
    scores: dict[int, _Score] = {}
    for games in (fit, test):
        for first in range(0, len(games), ROWS):
            some = games[first : first + ROWS]
            board = torch.from_numpy(replayed(some)[0]).long().flatten(0, 1)
            for name, features in read(some).items():
                features, board = features.flatten(0, 1), board.to(features.device)
                if games is fit:
                    probes.setdefault(name, Ridge()).add(features, F.one_hot(board, 3).flatten(1))
                else:
                    values = probes[name](features).unflatten(1, (SQUARES, 3))
                    scores.setdefault(name, _Score()).add(values, board)
    return {name: score.shares() for name, score in scores.items()}


def _ids(games: np.ndarray) -> Tensor:
    return torch.from_numpy(games).long()


def _probed(settings: Othello) -> dict[str, int]:
    return {"fit": settings.probe_games, "test": settings.probe_games // 2}


def _model(settings: Othello) -> HybridForCausalLM:
    converts = not is_attention(settings.mixer)
    config = StudentConfig(mixer=settings.mixer, keep_attention=[]) if converts else StudentConfig(keep_attention=1.0)
    return untrained(
        "llama",
        config,
        settings.seed,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
    )


def _trained(
    settings: Othello, model: HybridForCausalLM, out: Path, accelerator: Accelerator, console: Console
) -> HybridForCausalLM:
    folder = StageFolder(out, "train")
    needs = {k: v for k, v in asdict(settings).items() if k != "probe_games"}
    if folder.why_not_reusable(needs) is None:
        found = on_device(load_model(folder / "model", "float32"), model.device)
        return cast(HybridForCausalLM, found)  # what was saved there
    folder.begin(needs)
    data = Games(random_games(settings.games, settings.seed + SEEDS["train"]))
    config = TrainConfig(steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, weight_decay=0.1)
    parameters = dict(model.named_parameters())
    groups = [{"name": "all", "parameters": parameters, "lr": settings.lr}]
    trained = train(LanguageModeling(model), groups, config, data, folder, accelerator, console, settings.seed)  # type: ignore[arg-type]
    model.eval().save_pretrained(folder / "model")
    folder.finish({"loss": trained.metrics.get("loss"), "seconds": trained.metrics["seconds"]})
    return model
