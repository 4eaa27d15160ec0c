"""A short campaign: every kind of input, nothing but right results and clear refusals.

And the campaign's own watch.
"""

import json
from random import Random

import pytest

from .campaign import plan, run
from .kinds import WEIGHTS
from .report import GOOD, causes, summary
from .values import mutate

COUNT = 300


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """In one process: each prepares what it mutates, and other tests run beside."""
    return list(run(plan(COUNT, 9, WEIGHTS), tmp_path_factory.mktemp("mutations"), workers=1))


def test_right_or_refused(results):
    assert not causes(results), summary(results)


def test_every_kind_has_both(results):
    """A kind of which nothing is ever accepted tests only that something raises."""
    found = {(r["kind"], r["verdict"]) for r in results}
    assert {(kind, verdict) for kind in WEIGHTS for verdict in GOOD} <= found


def test_a_seed_gives_the_same_input():
    tree = {"a": [1, 2, {"b": "x"}], "c": None}
    assert [mutate(Random(i), tree) for i in range(50)] == [
        mutate(Random(i), tree) for i in range(50)
    ]
    assert len({mutate(Random(i), tree).data for i in range(50)}) > 30
    assert json.loads(json.dumps(plan(100, 3, WEIGHTS))) == plan(100, 3, WEIGHTS)
    assert {case.split(":")[0] for case in plan(100, 3, WEIGHTS)} == set(WEIGHTS)
