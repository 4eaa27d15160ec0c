"""Gated DeltaNet mixers from the attention that they replace.

* Queries and keys are copied, keys and values expanded by head: query head j reads key/value head
  j // group. Narrower heads are filled up with zeros.
* The SiLU after the value convolution is undone: v = [W_v; -W_v], as silu(x) - silu(-x) = x.
* w, the least-squares solution of w . x = 1 over the normed inputs, stands for the constant that
  the mixer lacks: a bias b of the attention is folded as W + b w^T, and a gate row of 1.5 w keeps
  the output gate nearly constant.
* A head's half-life is the mean distance that its attention looks back, without token 0.
* The output projection is a ridge regression of the attention's output.
"""

import logging
from collections.abc import Mapping

import numpy as np

from infinitevl_jax.config.model import LINEAR, ModelConfig
from infinitevl_jax.config.student import AttentionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import Params, unstack
from infinitevl_jax.sharding import to_host
from infinitevl_jax.train.initialise.initialiser import MIXER, Setting, register_initialiser
from infinitevl_jax.train.initialise.paper import inverse_softplus
from infinitevl_jax.train.initialise.statistics import (
    Inputs,
    Products,
    measure_inputs,
    measure_products,
)

logger = logging.getLogger(__name__)

GATE = 1.5  # silu(1.5) is 1.23, where silu is nearly linear
GATE_NOISE = 0.02  # of the gate rows, as a share of a new projection's
INPUT_SHARE = 4  # a quarter of the tokens measures the inputs, the rest fits the output
RIDGE = 1e-3  # of w, as a share of the mean diagonal


def attention(setting: Setting, options: AttentionConfig) -> Params:
    """Values of all Gated DeltaNet mixers, after one pass over `options.tokens` tokens."""
    check(setting.source, setting.student)
    types = setting.student.text.layer_types
    layers = [i for i, kind in enumerate(types) if kind == LINEAR]
    if not layers:
        return {}
    batches, tokens = setting.batches(), options.tokens
    first = max(1, tokens // INPUT_SHARE)
    logger.info(f"initialising {len(layers)} mixers from attention, on {tokens:,} tokens")
    inputs = measure_inputs(setting, batches, first, layers)
    stacks = {name: p for name, p in setting.source_params.items() if f".{MIXER}." in name}
    source = unstack(setting.source, stacks, setting.stacked)
    rng = np.random.default_rng(setting.seed)
    mixers: dict[int, dict[str, np.ndarray]] = {}
    for layer, found in zip(layers, inputs, strict=True):
        made = mixer(_attention_of(source, layer), found, setting, options, rng)
        mixers[layer] = {name: value.astype(np.float32) for name, value in made.items()}
    out: Params = {}
    for name in mixers[layers[0]]:
        out |= setting.replace(name, {layer: mixers[layer][name] for layer in layers})
    params = {**setting.params, **out}
    products = measure_products(setting, params, batches, tokens - first, layers)
    outputs = {
        layer: output_projection(found, options.ridge)
        for layer, found in zip(layers, products, strict=True)
    }
    return out | setting.replace("o_proj.kernel", outputs)


def mixer(
    weights: Mapping[str, np.ndarray],
    found: Inputs,
    setting: Setting,
    options: AttentionConfig,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """A Gated DeltaNet mixer but for its output projection.

    Args:
      weights: of the attention, by name in it.
      found: sums over the inputs of the attention.
    """
    source, text = setting.source.text, setting.student.text
    heads, keys, values = text.num_linear_heads, text.linear_head_dim, text.linear_value_dim
    width = text.hidden_size
    one = constant_row(found)

    def project(name: str) -> np.ndarray:
        """[width, heads, head_dim], a bias folded in, keys and values expanded by head."""
        kernel = weights[f"{name}.kernel"]
        if f"{name}.bias" in weights:
            kernel = kernel + np.outer(one, weights[f"{name}.bias"])
        return by_head(kernel, source.head_dim, heads)

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    if source.query_key_norm:  # only the direction of a head counts, after its norm as before
        q, k = q * weights["q_norm.weight"], k * weights["k_norm.weight"]
    taps = np.zeros((text.conv_size, 1))
    taps[-1] = 1.0
    noise = rng.uniform(-1, 1, (width, heads * values)) * GATE_NOISE * width**-0.5
    step = np.log(2) / half_lives(found, options)
    return {
        "q_proj.kernel": _wide(q, keys),
        "k_proj.kernel": _wide(k, keys),
        "v_proj.kernel": _wide(np.concatenate([v, -v], -1), values),
        "q_conv1d.weight": np.tile(taps, heads * keys),
        "k_conv1d.weight": np.tile(taps, heads * keys),
        "v_conv1d.weight": np.tile(taps, heads * values),
        "a_proj.kernel": np.zeros((width, heads)),
        "b_proj.kernel": np.zeros((width, heads)),
        "g_proj.kernel": GATE * one[:, None] + noise,
        "A_log": np.zeros(heads),
        "dt_bias": inverse_softplus(step),
        "o_norm.weight": np.ones(values),
    }


def by_head(kernel: np.ndarray, head_dim: int, heads: int) -> np.ndarray:
    """A projection [width, any heads x head_dim] as [width, heads, head_dim]: each of its heads
    serves a group of neighbours."""
    own = kernel.reshape(len(kernel), -1, head_dim)
    return np.repeat(own, heads // own.shape[1], axis=1)


def constant_row(found: Inputs) -> np.ndarray:
    """w [width] with w . x = 1 in the least squares of the inputs x."""
    gram = np.asarray(found.gram, np.float64)
    return np.linalg.solve(_ridge(gram, RIDGE), np.asarray(found.total, np.float64))


def half_lives(found: Inputs, options: AttentionConfig) -> np.ndarray:
    """Half-life of each head [heads] in tokens."""
    distance, mass = (np.asarray(x, np.float64) for x in (found.distance, found.mass))
    mean = np.where(mass > 0, distance / np.where(mass > 0, mass, 1), options.longest)
    return np.clip(mean, options.shortest, options.longest)


def output_projection(found: Products, ridge: float) -> np.ndarray:
    """Kernel [features, width] of the output projection."""
    gram = np.asarray(found.gram, np.float64)
    return np.linalg.solve(_ridge(gram, ridge), np.asarray(found.cross, np.float64))


def _ridge(gram: np.ndarray, share: float) -> np.ndarray:
    """The normal equations with a share of the mean diagonal added to the diagonal."""
    diagonal = max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny)
    return gram + share * diagonal * np.eye(len(gram))


def _wide(kernel: np.ndarray, dim: int) -> np.ndarray:
    """[width, heads, any dim] -> [width, heads x dim], heads filled up with zeros."""
    short = dim - kernel.shape[-1]
    return np.pad(kernel, [(0, 0), (0, 0), (0, short)]).reshape(len(kernel), -1)


def _attention_of(params: Params, layer: int) -> dict[str, np.ndarray]:
    """The attention of a layer in float64, by name in it."""
    start = f"layers.{layer}.{MIXER}."
    return {
        name.removeprefix(start): to_host(value).astype(np.float64)
        for name, value in params.items()
        if name.startswith(start)
    }


def check(source: ModelConfig, student: ModelConfig) -> None:
    """Raise InfiniteVLError if the attention does not fit into the student's mixers."""
    theirs, ours = source.text, student.text
    if theirs.attention_output_gate:
        raise InfiniteVLError(
            "the attention of model.from has an output gate, which has no place in the student",
            'use model.mixers.initialise.name = "paper"',
        )
    heads = theirs.num_attention_heads
    if ours.num_linear_heads != heads or ours.linear_key_heads != heads:
        raise InfiniteVLError(
            f"model.mixers.num_linear_heads is {ours.num_linear_heads}, the attention of model.from"
            f" has {heads} query heads",
            f"num_linear_heads = {heads}, as heads are copied one by one",
        )
    needs = theirs.head_dim, 2 * theirs.head_dim
    if ours.linear_head_dim < needs[0] or ours.linear_value_dim < needs[1]:
        raise InfiniteVLError(
            f"model.mixers has keys {ours.linear_head_dim} and values {ours.linear_value_dim} wide,"
            f" the attention's heads are {theirs.head_dim} wide",
            f"keys of {needs[0]} and values of {needs[1]} or more (linear_head_dim, expand_v)",
        )


register_initialiser("attention", attention, AttentionConfig)
