"""Invalid calls of a model are refused by name before any computation."""

import jax
import numpy as np
import pytest
from tiny import hybrid_config

from infinitevl_jax import InfiniteVL, InfiniteVLError
from infinitevl_jax.config.model import TextConfig, VisionConfig
from infinitevl_jax.nn.params import parameters

S = "sliding_attention"


@pytest.fixture(scope="module")
def model():
    """A model of zeros; it never computes."""
    config = hybrid_config()
    return InfiniteVL(
        config,
        {
            name: np.zeros(s.shape, np.float32)
            for name, s in parameters(config, scanned=False).items()
        },
    )


def full(model):
    config = hybrid_config(layer_types=("full_attention",))
    return InfiniteVL(
        config,
        {
            name: np.zeros(s.shape, np.float32)
            for name, s in parameters(config, scanned=False).items()
        },
    )


CASES = {
    "cache of another batch": (
        lambda m: m([[1], [2], [3]], cache=m.init_cache(1)),
        "holds 1 sequences, input_ids 3",
    ),
    "full-attention cache without size": (lambda m: full(m).init_cache(1), "max_length"),
    "full-attention cache too small": (
        lambda m: full(m)([[1, 2, 3]], cache=full(m).init_cache(1, 2)),
        "made for 2 tokens",
    ),
    "unknown dtype": (lambda m: InfiniteVL.from_pretrained("anywhere", dtype="int8"), "int8"),
    "unknown mesh axis": (
        lambda m: InfiniteVL.random(m.config, mesh=jax.make_mesh((8,), ("model",))),
        "'model' is unknown",
    ),
    "explicit mesh axes": (
        lambda m: InfiniteVL.random(
            m.config,
            mesh=jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,)),
        ),
        "explicit axes",
    ),
    "three convolution taps": (lambda m: TextConfig((S,), conv_size=3), "conv_size is 3"),
    "odd head width": (lambda m: TextConfig((S,), head_dim=15, mrope_section=None), "head_dim 15"),
    "fractional value width": (
        lambda m: TextConfig((S,), linear_head_dim=15, expand_v=1.5),
        "expand_v 1.5",
    ),
    "unknown layer": (lambda m: TextConfig(("mamba",)), "mamba"),
    "no layers": (lambda m: TextConfig(()), "nothing"),
    "heads that do not divide": (
        lambda m: TextConfig((S,), num_key_value_heads=3),
        "num_key_value_heads 3",
    ),
    "window of nothing": (lambda m: TextConfig((S,), sliding_window=0), "sliding_window is 0"),
    "sections that do not fill a head": (
        lambda m: TextConfig((S,), mrope_section=(1, 2, 3)),
        "sums to 6",
    ),
    "vision window of broken tokens": (lambda m: VisionConfig(window_size=100), "window_size 100"),
}


@pytest.mark.parametrize("name", CASES)
def test_is_named(model, name):
    action, culprit = CASES[name]
    with pytest.raises(InfiniteVLError, match=culprit) as error:
        action(model)
    assert len(str(error.value).splitlines()) <= 10
