"""An objective that is defined outside the package trains through a preset."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import pytest
from msgspec import Meta
from tiny_run import write_preset

from infinitevl_jax.config.objective import ObjectiveConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.forward import hidden_states
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train
from infinitevl_jax.train.objectives import Mean, Measured, register_objective


@dataclass(frozen=True)
class Size(ObjectiveConfig):
    name: str = "size"
    target: Annotated[float, Meta(ge=0, le=10)] = 1.0


def size(models, batch, options):
    """Hidden states of answers shall have the mean square `target`."""
    _, hidden = hidden_states(models["student"], batch)
    square = (hidden.astype(jnp.float32) ** 2).mean(-1)
    count = batch.weights.sum()
    distance = (batch.weights * (square - options.target) ** 2).sum()
    return Measured(
        (Mean(distance, count),), {"square": Mean((batch.weights * square).sum(), count)}
    )


register_objective("size", size, options=Size)


def test_it_trains(tmp_path, tiny_data):
    changes = [
        "train.data.held_out=''",
        "train.objective={name = 'size', target = 0.25}",
        "train.optimizer.peak_lr=0.1",
    ]
    outcome = train(load_preset(write_preset(tmp_path, tiny_data), changes))
    lines = [line for line in read_log(outcome.run / "log.jsonl") if "loss" in line]
    squares = [abs(line["square"] - 0.25) for line in lines]
    assert outcome.finished and squares[-1] < 0.5 * squares[0]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_its_options_are_checked(tmp_path, tiny_data):
    path = write_preset(tmp_path, tiny_data)
    with pytest.raises(InfiniteVLError, match=r"train\.objective\.target is 11"):
        load_preset(path, ["train.objective.name=size", "train.objective.target=11"])
    with pytest.raises(InfiniteVLError, match="unknown key 'train.objective.tarjet'") as caught:
        load_preset(path, ["train.objective.name=size", "train.objective.tarjet=1"])
    assert "train.objective.target" in caught.value.cure
    with pytest.raises(InfiniteVLError, match="registered already"):
        register_objective("size", lambda *args: size(*args))
