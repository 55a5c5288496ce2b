"""The rules of Othello, against numbers that others have counted and boards that a plain player makes."""

import numpy as np
import pytest

from transpoint.distill.probe.othello import MOVES, beginning, perft, random_games, replayed


@pytest.mark.parametrize("depth, count", list(enumerate([1, 4, 12, 56, 244, 1396, 8200, 55092])))
def test_there_are_as_many_games_of_a_length_as_others_have_counted(depth, count):
    assert perft(depth) == count


def plain(game):
    """Boards by loops over squares: 1 and -1 are the players."""
    board, player = np.zeros((8, 8), int), 1
    board[3, 4] = board[4, 3] = 1
    board[3, 3] = board[4, 4] = -1

    def turned(square, player):
        row, column, found = square // 8, square % 8, []
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                line, r, c = [], row + dr, column + dc
                while (dr or dc) and 0 <= r < 8 and 0 <= c < 8 and board[r, c] == -player:
                    line.append((r, c))
                    r, c = r + dr, c + dc
                if line and 0 <= r < 8 and 0 <= c < 8 and board[r, c] == player:
                    found += line
        return found if board[row, column] == 0 else []

    for square in map(int, game):
        flips = turned(square, player)
        assert flips, "an illegal move"
        board[square // 8, square % 8] = player
        for place in flips:
            board[place] = player
        player = -player
        if not any(turned(s, player) for s in range(64)) and any(turned(s, -player) for s in range(64)):
            player = -player
        legal = [bool(turned(s, player)) for s in range(64)]
        yield np.where(board == player, 1, np.where(board == -player, 2, 0)).ravel(), legal


def test_random_games_are_legal_and_their_boards_those_of_a_plain_player():
    games = random_games(12, seed=3)
    boards, legal = replayed(games)
    assert games.shape == (12, MOVES) and boards.shape == legal.shape == (12, MOVES, 64)
    for game, own, may in zip(games, boards, legal, strict=True):
        for t, (board, expected) in enumerate(plain(game)):
            assert (own[t] == board).all() and (may[t] == expected).all()
    assert (boards[:, -1] > 0).all() and not legal[:, -1].any()


def test_games_follow_from_the_seed_and_differ():
    games = random_games(100, seed=0)
    assert (games == random_games(100, seed=0)).all() and (games != random_games(100, seed=1)).any()
    assert len(np.unique(games, axis=0)) == 100
    assert set(games[:, 0]) == set(np.flatnonzero(np.unpackbits(beginning().legal.view(np.uint8), bitorder="little")))
