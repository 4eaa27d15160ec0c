"""LoRA beside linear layers: value and gradient against a plain formula, layouts, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import hybrid_config, initialised, loud

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.layers import Linear, RMSNorm
from infinitevl_jax.nn.lora import (
    LoraLinear,
    initialize_adapters,
    is_adapter,
    merge_adapters,
)
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import functional, initialize, parameters, unstack
from pallas_kernels.testing.parity import rel_rms

KINDS = (SLIDING, LINEAR) * 2 + (SLIDING,)  # two stacks of two layers, and one more
CONFIG = hybrid_config(layer_types=KINDS, tie_word_embeddings=False)
LORA = LoraConfig(rank=3, alpha=6, targets=(r"layers\..*\.(q|k|v|g|o|gate|up|down)_proj",))


TOKENS = np.random.default_rng(0).integers(1, 90, (1, 39))


@pytest.fixture(scope="module")
def base():
    return loud(initialize(CONFIG, jax.random.key(0), scanned=True))


@pytest.fixture(scope="module")
def adapters():
    """Of two random matrices each."""
    known = parameters(CONFIG, scanned=True, lora=LORA)
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.normal(size=p.shape) * p.shape[-2] ** -0.5, jnp.float32)
        for name, p in known.items()
        if is_adapter(name)
    }


def logits(params, scanned=True, lora=None, dtype=jnp.float32):
    """Of one row of text."""
    inputs = build_inputs(CONFIG, TOKENS).decoder

    @jax.jit
    def run(params):
        params = params if scanned else unstack(CONFIG, dict(params), lora=lora)
        model = functional(CONFIG, scanned=scanned, lora=lora, dtype=dtype)(params)
        return model.logits(model.decode(model.embed(inputs, None), inputs)[0])

    return np.asarray(run(params))


@pytest.mark.parametrize("rank,alpha,rslora", [(1, 1.0, False), (5, 3.0, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_against_a_plain_formula(rank, alpha, rslora, bias):
    config = LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora, targets=("unused",))
    linear = Linear(7, 11, ("width", "heads"), bias=bias)
    graphdef, _ = nnx.split(LoraLinear(linear, config))
    rng = np.random.default_rng(0)
    shapes = {"kernel": (7, 11), "lora_a": (7, rank), "lora_b": (rank, 11)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if bias:
        values["bias"] = rng.normal(size=11)
    x, cotangent = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 11))
    scale = alpha / (rank**0.5 if rslora else rank)

    def apply(values, x):
        tree = [((name,), nnx.Param(value)) for name, value in values.items()]
        return nnx.merge(graphdef, nnx.from_flat_state(tree))(x)

    narrow = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (values, x))
    found, pull = jax.vjp(apply, *narrow)
    gradient, dx = pull(jnp.asarray(cotangent, jnp.float32))
    w, a, b = (values[name] for name in shapes)
    y = np.einsum("btd,do->bto", x, w + scale * (a @ b)) + values.get("bias", 0.0)
    assert rel_rms(found, y) <= 1e-6
    flat, dy = x.reshape(-1, 7), cotangent.reshape(-1, 11)
    expected = {
        "kernel": flat.T @ dy,
        "lora_a": scale * flat.T @ dy @ b.T,
        "lora_b": scale * (flat @ a).T @ dy,
        "bias": dy.sum(0),
    }
    for name, value in gradient.items():
        assert rel_rms(value, expected[name]) <= 1e-6, name
    assert rel_rms(dx, cotangent @ (w + scale * a @ b).T) <= 1e-6


def test_one_token_of_a_step_passes_its_adapter():
    config = LoraConfig(rank=2, targets=("unused",))
    layer = initialised(LoraLinear(Linear(8, 8, ("width", "heads")), config))
    layer.lora_a[...], layer.lora_b[...] = jnp.ones((8, 2)), jnp.ones((2, 8))
    x, norm = jax.random.normal(jax.random.key(1), (2, 1, 8)), initialised(RMSNorm(8, 1e-6))
    found = layer.step(resolve_ops(None), x, norm=norm, residual=x)
    np.testing.assert_array_equal(found, x + layer(norm(x)))
    assert rel_rms(Linear.step(layer, resolve_ops(None), x, norm=norm, residual=x), found) > 0.1


def test_adapters_are_the_only_new_parameters():
    plain, known = (parameters(CONFIG, scanned=False, lora=x) for x in (None, LORA))
    assert {name: p for name, p in known.items() if not is_adapter(name)} == plain
    added = known.keys() - plain.keys()
    mixers = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for layer in range(5):
        gates = {"g_proj"} if KINDS[layer] == LINEAR else set()
        wanted = {f"self_attn.{n}" for n in mixers | gates}
        wanted |= {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
        start = f"layers.{layer}."
        found = {n.removeprefix(start).rpartition(".")[0] for n in added if n.startswith(start)}
        assert found == wanted
    down = "layers.3.mlp.down_proj"
    assert (known[f"{down}.lora_a"].shape, known[f"{down}.lora_b"].shape) == ((48, 3), (3, 32))
    assert known[f"{down}.lora_a"].axes == ("hidden", None)
    assert known[f"{down}.lora_b"].axes == (None, "width")
    stacked = parameters(CONFIG, scanned=True, lora=LORA)["layers.blocks.1.mlp.down_proj.lora_a"]
    assert stacked.shape == (2, 48, 3) and stacked.layers[1] == f"{down}.lora_a"


def test_new_adapters_change_no_bit(base):
    new = initialize_adapters(parameters(CONFIG, scanned=True, lora=LORA), jax.random.key(3))
    plain = logits(base)
    np.testing.assert_array_equal(logits(base | new, lora=LORA), plain)
    halves = {name: p.astype(jnp.bfloat16) for name, p in base.items()}
    narrow = logits(halves | new, lora=LORA, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(narrow, logits(halves, dtype=jnp.bfloat16))


def test_new_adapters_are_pefts_and_the_same_in_every_layout():
    key = jax.random.key(3)
    scanned, flat = (
        initialize_adapters(parameters(CONFIG, scanned=s, lora=LORA), key) for s in (True, False)
    )
    again = unstack(CONFIG, dict(scanned), lora=LORA)
    assert again.keys() == flat.keys()
    for name, value in flat.items():
        np.testing.assert_array_equal(value, again[name])
        assert np.any(value) == name.endswith("lora_a")
    a = flat["layers.2.mlp.down_proj.lora_a"]  # Kaiming's with sqrt(5): within 1/sqrt(48)
    assert 0.9 < float(jnp.abs(a).max()) * 48**0.5 <= 1
    values = [np.asarray(v).tobytes() for n, v in flat.items() if n.endswith("lora_a")]
    assert len(set(values)) == len(values)


def test_merged_equals_unmerged(base, adapters):
    whole = logits(base | adapters, lora=LORA)
    merged = merge_adapters(base | adapters, LORA.scale)
    assert merged.keys() == base.keys()
    assert rel_rms(logits(merged), whole) <= 1e-5
    assert rel_rms(logits(base), whole) > 0.1
    name = "layers.blocks.1.self_attn.g_proj"
    a, b = (np.asarray(adapters[f"{name}.lora_{s}"], np.float64) for s in "ab")
    np.testing.assert_allclose(
        merged[f"{name}.kernel"], np.asarray(base[f"{name}.kernel"]) + 2 * a @ b, atol=1e-6
    )


def test_scanned_equals_unrolled(base, adapters):
    both = [logits(base | adapters, scanned, LORA) for scanned in (True, False)]
    assert rel_rms(both[0], both[1]) <= 1e-5


@pytest.mark.parametrize(
    "targets,culprit",
    [
        ((r"layers\..*\.r_proj",), "'layers.*r_proj' matches no linear layer"),
        ((r"layers\.1\.mlp\.up_proj",), "layers.1.mlp.up_proj, but not layers.3.mlp.up_proj"),
        ((r"visual\.patch_embed",), "matches no linear layer"),  # a convolution in torch
    ],
)
def test_targets_that_cannot_be(targets, culprit):
    with pytest.raises(InfiniteVLError, match=culprit):
        parameters(CONFIG, scanned=True, lora=LoraConfig(targets=targets))


def test_some_layers_and_the_tower_may_be_targets():
    targets = (r"layers\.4\..*_proj", r"visual\.blocks\..*\.qkv", "lm_head")
    known = parameters(CONFIG, scanned=True, lora=LoraConfig(rank=2, targets=targets))
    found = {layer for n, p in known.items() if is_adapter(n) for layer in p.layers}
    assert {n.split(".")[1] for n in found if n.startswith("layers.")} == {"4"}
    assert {f"visual.blocks.{i}.attn.qkv.lora_a" for i in range(2)} <= found


@pytest.mark.parametrize(
    "options,culprit",
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("(",)}, "is not a regular expression"),
    ],
)
def test_bad_settings(options, culprit):
    with pytest.raises(InfiniteVLError, match=culprit):
        LoraConfig(**options)
