"""Schedule, weight decay, what trains."""

import jax.numpy as jnp
import numpy as np

from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.train.optimizer import make_optimizer, schedule, split_trainable

NAMES = [
    "layers.rest.0.self_attn.A_log",
    "layers.rest.0.self_attn.dt_bias",
    "layers.rest.0.self_attn.o_norm.weight",
]
NAMES += [
    "layers.blocks.1.input_layernorm.weight",
    "visual.merger.fc1.bias",
    "visual.blocks.rest.0.norm2.weight",
    "norm.weight",
]
DECAYED = [
    "layers.rest.0.self_attn.q_conv1d.weight",
    "embed_tokens.embedding",
    "layers.rest.0.mlp.up_proj.kernel",
]


def test_schedule_rises_and_falls():
    rate = schedule(OptimizerConfig(peak_lr=1.0, warmup=0.1, final=0.1), 100)
    assert [round(float(rate(s)), 3) for s in (0, 5, 10, 55, 100)] == [0.0, 0.5, 1.0, 0.55, 0.1]
    assert (
        float(schedule(OptimizerConfig(peak_lr=1.0, warmup=0.5), 1)(0)) == 1.0
    )  # a single step is no warm-up


def test_gates_norms_and_biases_do_not_decay():
    params = {name: jnp.ones(3) for name in NAMES + DECAYED}
    optimizer = make_optimizer(OptimizerConfig(peak_lr=1.0, warmup=0.0, weight_decay=0.5), 10)
    update, _ = optimizer.update(
        {name: jnp.zeros(3) for name in params}, optimizer.init(params), params
    )
    for name in NAMES:
        np.testing.assert_array_equal(update[name], 0)
    for name in DECAYED:
        np.testing.assert_allclose(update[name], -0.5)


def test_patterns_choose_by_whole_name():
    train, frozen = split_trainable(NAMES, [r"layers\..*self_attn\..*", "norm.weight"])
    assert train == [*NAMES[:3], "norm.weight"] and frozen == NAMES[3:6]
