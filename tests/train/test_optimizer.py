"""Trained parameters, weight decay, learning rate."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import hybrid_config

from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.optimizer import (
    learning_rate_factors,
    make_optimizer,
    schedule,
    split_trainable,
)

CONFIG = hybrid_config(layers=9)  # two periods and a remainder
KEPT = [  # no weight decay
    "layers.1.self_attn.A_log",
    "layers.1.self_attn.dt_bias",
    "layers.1.self_attn.o_norm.weight",
    "layers.8.input_layernorm.weight",
    "layers.0.self_attn.q_proj.bias",
    "visual.merger.fc1.bias",
    "visual.merger.ln_q.weight",
    "visual.blocks.0.norm2.weight",
    "norm.weight",
]
DECAYED = [
    "layers.1.self_attn.q_conv1d.weight",
    "embed_tokens.embedding",
    "layers.0.mlp.up_proj.kernel",
    "visual.patch_embed.kernel",
]


def test_schedule_rises_and_falls():
    rate = schedule(OptimizerConfig(peak_lr=1.0, warmup=0.1, final=0.1), 100)
    assert [round(float(rate(s)), 3) for s in (0, 5, 10, 55, 100)] == [0.0, 0.5, 1.0, 0.55, 0.1]
    # a single step has no warm-up
    assert float(schedule(OptimizerConfig(peak_lr=1.0, warmup=0.5), 1)(0)) == 1.0


@pytest.mark.parametrize("scanned", [False, True])
def test_gates_norms_and_biases_do_not_decay(scanned):
    known = parameters(CONFIG, scanned=scanned)
    params = {name: jnp.ones(3) for name in known}
    config = OptimizerConfig(peak_lr=1.0, warmup=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, 10, known)
    update, _ = optimizer.update(
        {name: jnp.zeros(3) for name in params}, optimizer.init(params), params
    )
    by_layer = {layer: update[name] for name, found in known.items() for layer in found.layers}
    for name in KEPT:
        np.testing.assert_array_equal(by_layer[name], 0)
    for name in DECAYED:
        np.testing.assert_allclose(by_layer[name], -0.5)


@pytest.mark.parametrize("scanned", [False, True])
def test_patterns_choose_by_whole_name(scanned):
    known = parameters(CONFIG, scanned=scanned)
    train, frozen = split_trainable(known, [r"layers\..*self_attn\..*", "norm.weight"])
    assert sorted(train + frozen) == sorted(known)
    layers = {layer for name in train for layer in known[name].layers}
    assert layers == {
        layer
        for found in known.values()
        for layer in found.layers
        if ".self_attn." in layer or layer == "norm.weight"
    }


def test_layers_that_are_scanned_together_train_together():
    known = parameters(CONFIG, scanned=True)
    assert split_trainable(known, [r"layers\.[04]\.mlp\..*"])[0]  # the layers of one block
    with pytest.raises(InfiniteVLError, match=r"layers\.0\.mlp.*but not layers\.4\.mlp"):
        split_trainable(known, [r"layers\.0\.mlp\..*"])
    alone, _ = split_trainable(parameters(CONFIG, scanned=False), [r"layers\.0\.mlp\..*"])
    assert len(alone) == 3


@pytest.mark.parametrize("scanned", [False, True])
def test_the_first_pattern_decides_the_learning_rate(scanned):
    known = parameters(CONFIG, scanned=scanned)
    table = {r"layers\..*\.self_attn\..*": 1.0, r"embed_tokens\..*": 0.0, r"layers\..*": 0.1}
    factors = learning_rate_factors(known, table)
    by_layer = {layer: factors.get(name, 0) for name in known for layer in known[name].layers}
    for layer, factor in by_layer.items():
        inside = layer.startswith("layers.")
        assert factor == (1.0 if ".self_attn." in layer else 0.1 if inside else 0), layer
    train, frozen = split_trainable(known, table)
    assert "embed_tokens.embedding" in frozen and sorted(train + frozen) == sorted(known)


def test_groups_step_by_their_factor():
    known = parameters(CONFIG, scanned=True)
    factors = dict.fromkeys(known, 1.0) | {"norm.weight": 0.25}
    config = OptimizerConfig(peak_lr=1e-3, warmup=0.0, weight_decay=0.0, clip=1e12)
    params = {name: jnp.ones(3) for name in known}
    gradient = {name: jnp.full(3, 2.0) for name in known}
    optimizer = make_optimizer(config, 10, known, factors)
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    for name, value in update.items():
        np.testing.assert_allclose(value, -1e-3 * factors[name], rtol=1e-4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"no_such": 1.0}, "'no_such' matches no parameter"),
        ({".*": 1.0, "norm.weight": 0.1}, "patterns before 'norm.weight' match all"),
        ({".*": 0.0}, "no parameter would train"),
        ({r"layers\.0\..*": 0.5, ".*": 1.0}, r"layers\.4\..*factor 1 and layers\.0\..*0\.5"),
    ],
)
def test_tables_that_say_nothing_clear_are_refused(table, message):
    with pytest.raises(InfiniteVLError, match=message):
        learning_rate_factors(parameters(CONFIG, scanned=True), table)
