"""Packing: every piece once, within the row, in few rows, and the same after a stop."""

import numpy as np
import pytest

from infinitevl_jax.data.packer import Packer, Piece


def pieces(seed, count=400, largest=100, patches=60):
    rng = np.random.default_rng(seed)
    return [
        Piece(i, int(rng.integers(1, largest + 1)), int(rng.integers(0, patches + 1)) * (i % 2))
        for i in range(count)
    ]


@pytest.mark.parametrize("lookahead", [1, 2, 16, 1000])
def test_each_piece_once_within_the_limits(lookahead):
    given = pieces(0)
    rows = list(Packer(iter(given), 128, 90, lookahead))
    assert sorted(p.key for row in rows for p in row) == list(range(400))
    for row in rows:
        assert sum(p.tokens for p in row) <= 128 and sum(p.patches for p in row) <= 90


def test_nothing_waits_for_long():
    """A row begins with the oldest: a piece waits for at most `lookahead` rows."""
    for number, row in enumerate(Packer(iter(pieces(1)), 128, 90, 8)):
        oldest = row[0].key
        assert all(oldest <= p.key for p in row)
        assert oldest >= number - 8  # every row takes one piece at least


def test_looking_ahead_fills_rows():
    given = pieces(2, count=3000, patches=0)
    tokens = sum(p.tokens for p in given)

    def filled(lookahead):
        return tokens / (256 * len(list(Packer(iter(given), 256, 0, lookahead))))

    assert filled(1) < 0.9 and filled(32) > 0.985


def test_waiting_patches_are_few():
    packer = Packer(iter(pieces(3, patches=60)), 1000, 60, 1000)
    while packer.row():
        assert sum(p.patches for p in packer.waiting) <= 2 * 60


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_a_stop_changes_nothing(stop):
    given = pieces(4, count=120)
    whole = list(Packer(iter(given), 128, 90, 12))
    stream = iter(given)
    first = Packer(stream, 128, 90, 12)
    rows = [first.row() for _ in range(stop)]
    rows += list(Packer(stream, 128, 90, 12, first.waiting))
    assert rows == whole


def test_a_row_can_be_ended():
    given = [Piece(0, 3, 0), None, Piece(1, 3, 0), None, None, Piece(2, 3, 0)]
    rows = [[p.key for p in row] for row in Packer(iter(given), 10, 0, 1)]
    assert rows == [[0], [1], [], [2]]
