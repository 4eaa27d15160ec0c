"""Fused layers on meshes of 8 devices: the tokens of one device; no weights move to decode one."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from tiny import hybrid_config, loud

from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.serve.slots import Slots
from infinitevl_jax.sharding import make_mesh, parameter_shardings

TINY = hybrid_config(layers=2, vocab_size=104)
CONFIG = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, hidden_size=64, intermediate_size=96),
    vision=None,
)
MESHES = {
    "data 2, fsdp 2, tensor 2": RunConfig(data=2, fsdp=2, tensor=2),
    "tensor 2, data 4": RunConfig(data=4, fsdp=1, tensor=2),
    "tensor 4, more than heads": RunConfig(fsdp=2, tensor=4),
}


@pytest.fixture(scope="module")
def params():
    return loud(initialize(CONFIG, jax.random.key(0), scanned=False))


@pytest.fixture(scope="module")
def alone(params):
    return InfiniteVL(CONFIG, params)


def spread(params, mesh):
    known = parameters(CONFIG, scanned=False)
    placed = jax.device_put(params, parameter_shardings(known, mesh))
    return InfiniteVL(CONFIG, placed, mesh=mesh)


@pytest.mark.parametrize("name", list(MESHES))
def test_tokens_equal_those_of_one_device(params, alone, name):
    model = spread(params, make_mesh(MESHES[name]))
    tokens = np.random.default_rng(0).integers(1, 90, (4, 30))
    asked = {"max_new_tokens": 12, "eos_token_ids": [-1]}
    np.testing.assert_array_equal(model.generate(tokens, **asked), alone.generate(tokens, **asked))
    for given in params:
        np.testing.assert_array_equal(model.params[given], params[given], err_msg=given)


def test_a_device_keeps_its_columns_of_every_layer(params):
    mesh = make_mesh(MESHES["tensor 2, data 4"])
    model, known = spread(params, mesh), parameters(CONFIG, scanned=False)
    by_parts = jax.device_put(params, parameter_shardings(known, mesh))
    assert len(model.params.groups) == 2 * 2
    for group in model.params.groups:
        joined = model.params.arrays[f"{group.name}.kernel"]
        for shard in joined.addressable_shards:
            own = [
                next(
                    s.data
                    for s in by_parts[f"{member}.kernel"].addressable_shards
                    if s.device == shard.device
                )
                for member in group.members
            ]
            assert all(
                part.shape[1] < known[f"{member}.kernel"].shape[1]
                for part, member in zip(own, group.members, strict=True)
            )
            if shard.data.ndim == 3:
                np.testing.assert_array_equal(shard.data, np.stack(own, 1))
            else:
                own = np.concatenate(own, 1)
                np.testing.assert_array_equal(shard.data[:, : own.shape[1]], own)


def test_layers_that_the_mesh_splits_differently_stay_separate(params):
    """Four devices split no row of two heads' decays."""
    model = spread(params, make_mesh(MESHES["tensor 4, more than heads"]))
    kinds = {group.name.rpartition(".")[2] for group in model.params.groups}
    assert kinds == {"qkv_proj", "gate_up_proj"}


def test_no_weights_move_to_decode_a_token(params):
    model = spread(params, make_mesh(MESHES["tensor 2, data 4"]))
    with jax.set_mesh(model.mesh):
        slots = jax.device_put(Slots.idle(4, CONFIG.text.vocab_size))
        arguments = model.params, model.init_cache(4), slots
        text = model.programs.decode.lower(*arguments, steps=1).compile().as_text()
    moved = re.findall(
        r"= \(?\w+\[([\d,]*)\].*? (?:all-gather|all-reduce|all-to-all|collective-permute)\(", text
    )
    sizes = [math.prod(map(int, shape.split(","))) for shape in moved if shape]
    # No array is larger than the logits of four tokens; matrices are, but for decays and strengths.
    assert 0 < max(sizes) <= 4 * 104
