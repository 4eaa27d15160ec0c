"""Initial values: one value a name in every layout, on every mesh, for any choice of parameters."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import hybrid_config

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.nn import initializers
from infinitevl_jax.nn.initializers import Normal, draw, fan_in, ones, zeros
from infinitevl_jax.nn.mixers.gated_delta_net import decay_rates, last_tap, step_sizes
from infinitevl_jax.nn.parameter import parameter
from infinitevl_jax.nn.params import functional, initialize, parameters, unstack
from infinitevl_jax.sharding import make_mesh, parameter_shardings

KINDS = (SLIDING, LINEAR) * 2 + (SLIDING,)  # two stacks of two layers, and one more
CONFIG = hybrid_config(layer_types=KINDS, tie_word_embeddings=False)
LORA = LoraConfig(rank=3, targets=(r"layers\..*\.(q|o|up)_proj",))
KEY = jax.random.key(5)
CONSTANT = {zeros, ones, last_tap}


def bits(params):
    return {name: (str(value.dtype), np.asarray(value).tobytes()) for name, value in params.items()}


@pytest.fixture(scope="module")
def flat():
    return initialize(CONFIG, KEY, scanned=False)


@pytest.fixture(scope="module")
def scanned():
    return initialize(CONFIG, KEY, scanned=True)


def test_a_value_is_that_of_its_name(flat):
    """By hand, for one parameter inside a stack and one outside."""
    for name, shape, bound in (
        ("layers.2.mlp.down_proj.kernel", (48, 32), 48**-0.5),
        ("lm_head.kernel", (32, 100), 32**-0.5),
    ):
        key = jax.random.fold_in(KEY, zlib.crc32(name.encode()))
        expected = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        np.testing.assert_allclose(flat[name], expected, rtol=0, atol=1e-7)


def test_every_layout_has_the_same_bits(flat, scanned):
    assert {name for name in scanned if ".blocks." in name and name.startswith("layers.")}
    assert bits(unstack(CONFIG, dict(scanned))) == bits(flat)
    labels = ("a", "a", "a", "a", "b")
    labelled = initialize(CONFIG, KEY, scanned=labels)
    assert bits(unstack(CONFIG, labelled, scanned=labels)) == bits(flat)


@pytest.mark.parametrize("layout", [True, False])
def test_a_mesh_has_the_same_bits(flat, scanned, layout):
    known, mesh = parameters(CONFIG, scanned=layout), make_mesh(RunConfig(fsdp=4, tensor=2))
    places = parameter_shardings(known, mesh)
    found = initialize(CONFIG, KEY, scanned=layout, shardings=places)
    assert {name: value.sharding for name, value in found.items()} == places
    kernel = next(value for name, value in found.items() if name.endswith("mlp.up_proj.kernel"))
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert bits(found) == bits(scanned if layout else flat)


def test_a_part_has_the_same_bits(scanned):
    some = {name for i, name in enumerate(sorted(scanned)) if i % 3 == 0}
    found = initialize(CONFIG, KEY, scanned=True, only=some)
    assert found.keys() == some
    assert bits(found) == {name: b for name, b in bits(scanned).items() if name in some}


def test_other_generators_have_the_same_bits_in_every_layout():
    """Under `vmap` this one would draw other values for each layer."""
    key = jax.random.key(5, impl="rbg")
    ends = ("self_attn.g_proj.kernel", "self_attn.A_log", "embedding")
    both = [
        initialize(
            CONFIG,
            key,
            scanned=s,
            only={n for n in parameters(CONFIG, scanned=s) if n.endswith(ends)},
        )
        for s in (True, False)
    ]
    assert len(both[1]) == 5
    assert bits(unstack(CONFIG, both[0])) == bits(both[1])
    place = parameter_shardings(parameters(CONFIG, scanned=False), make_mesh(RunConfig(fsdp=8)))
    spread = initialize(CONFIG, key, scanned=False, shardings=place, only=both[1])
    assert bits(spread) == bits(both[1])


def test_a_dtype_rounds_the_same_values(flat):
    name = "layers.0.mlp.up_proj.kernel"
    half = initialize(CONFIG, KEY, scanned=False, dtype=jnp.bfloat16, only={name})
    assert bits(half) == bits({name: flat[name].astype(jnp.bfloat16)})


def test_no_two_parameters_have_the_same_values():
    known = parameters(CONFIG, scanned=False, lora=LORA)
    values = {n: v for n, v in draw(known, KEY).items() if known[n].facts.init not in CONSTANT}
    assert sum(".lora_a" in name for name in values) == 15
    beginnings = [np.asarray(value).ravel()[:2].tobytes() for value in values.values()]
    assert len(set(beginnings)) == len(values) == 75
    other = initialize(CONFIG, jax.random.key(6), scanned=False)
    assert not any(np.array_equal(other[n], v) for n, v in values.items() if n in other)


def test_a_second_model_compiles_nothing_new(flat):
    before = initializers._drawing.cache_info().misses
    deeper = hybrid_config(layer_types=KINDS + (LINEAR, SLIDING), tie_word_embeddings=False)
    found = initialize(deeper, KEY, scanned=False)
    assert initializers._drawing.cache_info().misses == before
    assert bits(flat) == {name: b for name, b in bits(found).items() if name in flat}


@pytest.mark.parametrize(
    "init,transform,mean,std",
    [
        (Normal(0.3), lambda x: x, 0.0, 0.3),
        (fan_in, lambda x: x * 400**0.5, 0.0, 3**-0.5),
        (decay_rates, np.exp, 8.5, 15 / 12**0.5),
        # log-uniform in 1e-3..0.1, whose logarithm to the base 10 is uniform in -3..-1
        (step_sizes, lambda x: np.log10(np.log1p(np.exp(x))), -2.0, 2 / 12**0.5),
    ],
    ids=["normal", "fan_in", "decay_rates", "step_sizes"],
)
def test_distributions(init, transform, mean, std):
    """Mean and deviation within 5 standard errors; uniform ones also fill their range."""
    found = transform(np.float64(init(KEY, (400, 500))))
    assert abs(found.mean() - mean) <= 5 * std / found.size**0.5
    assert abs(found.std() - std) <= 5 * std / found.size**0.5
    if init != Normal(0.3):
        edge = 3**0.5 * std
        assert 0.999 * edge <= abs(found - mean).max() <= 1.0001 * edge


def test_constants():
    np.testing.assert_array_equal(zeros(KEY, (2, 3)), np.zeros((2, 3)))
    np.testing.assert_array_equal(ones(KEY, (2, 3)), np.ones((2, 3)))
    np.testing.assert_array_equal(last_tap(KEY, (3, 2)), [[0, 0], [0, 0], [1, 1]])


def test_layers_of_a_kind_are_equal():
    """So they share a trace, each with its own values."""
    values = initialize(CONFIG, KEY, scanned=False)
    layers = functional(CONFIG, scanned=False)(values).layers.rest
    graphdefs = [nnx.split(layer)[0] for layer in layers]
    assert graphdefs[0] == graphdefs[2] == graphdefs[4] and graphdefs[1] == graphdefs[3]
    assert len({hash(graphdef) for graphdef in graphdefs}) == 2 == len(set(graphdefs))
    assert Normal(0.5) == Normal(0.5) and hash(Normal(0.5)) == hash(Normal(0.5))


def test_a_function_made_for_one_layer_is_refused():
    def local(key, shape):
        return jnp.ones(shape)

    partial = functools.partial(jax.random.normal, dtype=jnp.float32)
    for init in (local, jax.nn.initializers.normal(0.1), partial):
        with pytest.raises(ValueError, match="made anew for each layer: define it at the top"):
            parameter((3,), init, (None,))


def transposing(key, shape):
    return jnp.ones(shape[::-1])


def test_a_wrong_shape_is_refused():
    found = parameters(CONFIG, scanned=False)["lm_head.kernel"]
    facts = parameter((32, 100), transposing, ("width", "vocab")).get_metadata()["facts"]
    with pytest.raises(ValueError, match=r"transposing.* gives the shape \(100, 32\) for \(32, 10"):
        draw({"lm_head.kernel": dataclasses.replace(found, facts=facts)}, KEY)
