"""Othello: random legal games, and the boards after each of their moves.

A board is two words of 64 bits, discs of who moves next and of the other; square i is row i // 8, column i % 8. Many
boards are played at once: all functions take and give arrays of as many words as there are boards.
"""

from typing import NamedTuple

import numpy as np

SQUARES, MOVES = 64, 60  # moves of a game that ends with a full board

_FULL = np.uint64(2**64 - 1)
_NOT_LEFT, _NOT_RIGHT = np.uint64(0xFEFEFEFEFEFEFEFE), np.uint64(0x7F7F7F7F7F7F7F7F)  # columns 0, 7
# How far a direction shifts a square, and on which squares it may arrive: not those of the next row.
_DIRECTIONS = [
    (1, _NOT_LEFT),
    (7, _NOT_RIGHT),
    (8, _FULL),
    (9, _NOT_LEFT),
    (-1, _NOT_RIGHT),
    (-7, _NOT_LEFT),
    (-8, _FULL),
    (-9, _NOT_RIGHT),
]


class Boards(NamedTuple):
    """mine: discs of who moves next, yours: those of the other. uint64 (n,) each."""

    mine: np.ndarray
    yours: np.ndarray

    @property
    def legal(self) -> np.ndarray:
        """Squares (n,) that who moves next may take, as bits; 0 where there are none."""
        found = np.zeros_like(self.mine)
        for direction in _DIRECTIONS:
            found |= _shift(_run(self.mine, self.yours, direction), direction)
        return found & ~(self.mine | self.yours)

    def played(self, squares: np.ndarray) -> "Boards":
        """After a legal move on each board: squares (n,). The other one moves next."""
        disc = np.uint64(1) << squares.astype(np.uint64)
        turned = np.zeros_like(disc)
        for direction in _DIRECTIONS:
            run = _run(disc, self.yours, direction)
            turned |= np.where(_shift(run, direction) & self.mine, run, np.uint64(0))
        return Boards(self.yours & ~turned, self.mine | disc | turned)

    def passed(self) -> "Boards":
        """The same, where who moves next cannot and the other one can: that one moves."""
        swap = (self.legal == 0) & (Boards(self.yours, self.mine).legal != 0)
        return Boards(np.where(swap, self.yours, self.mine), np.where(swap, self.mine, self.yours))


def beginning(count: int = 1) -> Boards:
    """So many boards before the first move."""
    mine, yours = (np.uint64((1 << a) | (1 << b)) for a, b in ((28, 35), (27, 36)))
    return Boards(np.full(count, mine), np.full(count, yours))


def random_games(count: int, seed: int) -> np.ndarray:
    """Squares (count, 60) of games in which every legal move is as likely, uint8.

    Games that end before the board is full are drawn again; passes, which the rules force, are not written down.
    """
    chance, kept, missing = np.random.default_rng(seed), [], count
    while missing > 0:
        boards = beginning(max(missing + missing // 4, 64))
        moves: list[np.ndarray] = []
        for _ in range(MOVES):
            legal = _bits(boards.legal)
            squares = (chance.random(legal.shape, dtype=np.float32) * legal).argmax(1)
            going = legal.any(1)
            boards = Boards(*(part[going] for part in boards)).played(squares[going]).passed()
            moves = [earlier[going] for earlier in moves] + [squares[going].astype(np.uint8)]
        kept.append(np.stack(moves, 1)[:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept)


def replayed(games: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boards after each move, and which squares are legal then.

    Args:
        games: (n, moves) squares.

    Returns:
        (n, moves, 64) uint8, 0 for an empty square, 1 for a disc of who moves next, 2 for one of the other; and
        (n, moves, 64) bool.
    """
    boards, found, legal = beginning(len(games)), [], []
    for squares in games.T:
        boards = boards.played(squares).passed()
        found.append(_bits(boards.mine) + 2 * _bits(boards.yours))
        legal.append(_bits(boards.legal).astype(bool))
    return np.stack(found, 1), np.stack(legal, 1)


def perft(depth: int) -> int:
    """How many sequences of so many moves there are from the beginning; a pass that is forced is a move."""
    boards = beginning()
    for _ in range(depth):
        legal = _bits(boards.legal)
        row, square = legal.nonzero()
        stuck = Boards(*(part[~legal.any(1)] for part in boards))
        turned = stuck.passed()
        stuck = Boards(*(part[turned.mine != stuck.mine] for part in turned))
        moved = Boards(*(part[row] for part in boards)).played(square)
        boards = Boards(*(np.concatenate(parts) for parts in zip(moved, stuck, strict=True)))
    return len(boards.mine)


def _shift(words: np.ndarray, direction: tuple[int, np.uint64]) -> np.ndarray:
    by, arrives = direction
    moved = words << np.uint64(by) if by > 0 else words >> np.uint64(-by)
    return moved & arrives


def _run(start: np.ndarray, through: np.ndarray, direction: tuple[int, np.uint64]) -> np.ndarray:
    """Squares of `through` that lie in one line behind those of `start`."""
    run = _shift(start, direction) & through
    for _ in range(5):
        run |= _shift(run, direction) & through
    return run


def _bits(words: np.ndarray) -> np.ndarray:
    """(n, 64) uint8 of (n,) words."""
    return np.unpackbits(words.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
