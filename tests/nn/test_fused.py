"""Layers that read the same input, fused for serving: the results of separate ones, in no more
memory, under the same names; and what a token step calls."""

import dataclasses
import gc
import inspect
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import hybrid_config, loud, shapes
from tiny_folder import full_attention_config, tiny_config

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import save_params
from infinitevl_jax.config.model import FULL, infinitevl_4b
from infinitevl_jax.inputs.model_inputs import text_inputs
from infinitevl_jax.nn import fuse as fusing
from infinitevl_jax.nn.cache import empty
from infinitevl_jax.nn.fuse import fuse
from infinitevl_jax.nn.fused import Pair, SideBySide
from infinitevl_jax.nn.fused_params import FusedParams
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import cache_spec, functional, initialize, parameters
from infinitevl_jax.serve.programs import Programs
from infinitevl_jax.serve.slots import Slots
from pallas_kernels.projection.api import COLUMNS
from pallas_kernels.projection.hopper import projection as hopper
from pallas_kernels.projection.hopper.plan import BLOCK
from pallas_kernels.testing.parity import rel_rms

ROWS, PROMPT, STEPS = 3, 20, 6
OPTIONS = {"partial_rotary_factor": 0.5, "query_key_norm": True, "attention_output_gate": True}
CONFIGS = {
    "infinitevl": hybrid_config(layers=2),
    "infinitevl, untied": tiny_config(),
    "qwen2": full_attention_config(),
    "qwen2_5_vl": dataclasses.replace(hybrid_config(layer_types=(FULL, FULL)), family="qwen2_5_vl"),
    "options": hybrid_config(layers=2, mrope_section=None, num_linear_key_heads=1, **OPTIONS),
}


@cache
def made(name):
    """A model's parameters, layer by layer."""
    return loud(initialize(CONFIGS[name], jax.random.key(0), scanned=False))


def live():
    """Bytes of all arrays on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_columns_side_by_side(shards):
    """Each device has its columns of every matrix, and zeros up to whole blocks."""
    rng, widths = np.random.default_rng(0), (12, 4, 100)
    layout = SideBySide(widths, shards)
    parts = [np.float32(rng.normal(size=(2, 5, width))) for width in widths]
    joined = np.asarray(layout.join(parts))
    for device, share in enumerate(np.split(joined, shards, -1)):
        own = np.concatenate([np.split(part, shards, -1)[device] for part in parts], -1)
        assert share.shape[-1] % COLUMNS == 0 and share.shape[-1] - own.shape[-1] < COLUMNS
        np.testing.assert_array_equal(share[..., : own.shape[-1]], own)
        assert not share[..., own.shape[-1] :].any()
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(layout.part(joined, i), part)


def test_pairs():
    gate, up = np.arange(6.0).reshape(2, 3), -np.arange(6.0).reshape(2, 3)
    joined = Pair().join([gate, up])
    np.testing.assert_array_equal(joined, np.stack([gate, up], 1))
    np.testing.assert_array_equal(Pair().part(joined, 1), up)


def test_the_published_sizes_are_those_that_kernels_are_tried_with():
    config = infinitevl_4b()
    assert COLUMNS % BLOCK == 0
    shapes = {
        name: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16)
        for name, p in parameters(config, scanned=False).items()
    }
    fused = jax.eval_shape(partial(fuse, config), shapes)
    found = {
        name.split(".", 2)[2]: a.shape for name, a in fused.arrays.items() if "layers.4." in name
    }
    assert found["self_attn.qkv_proj.kernel"] == (2048, 2560)
    assert found["self_attn.qkv_proj.bias"] == (2560,)
    assert found["mlp.gate_up_proj.kernel"] == (2048, 2, 11008)
    assert fused.arrays["layers.5.self_attn.input_proj.kernel"].shape == (2048, 12352)
    assert len(fused) == len(shapes) and not any(".q_proj" in name for name in fused.arrays)


def logits_of(name, dtype, fused: bool):
    """Logits of a prompt with pads and of some tokens after it: by fused layers and steps, or by
    separate ones as in training."""
    config, params = CONFIGS[name], {n: p.astype(dtype) for n, p in made(name).items()}
    params = fuse(config, params) if fused else params
    bind = functional(config, scanned=False, dtype=dtype)
    tokens = np.random.default_rng(0).integers(1, 90, (ROWS, PROMPT + STEPS)).astype(np.int32)
    index = np.tile(np.arange(PROMPT, dtype=np.int32), (ROWS, 1))
    index[1, 13:] = -1

    @jax.jit
    def run(params, tokens):
        vlm = bind(params)
        start = empty(vlm.cache_spec(ROWS, PROMPT + STEPS))
        inputs = text_inputs(tokens[:, :PROMPT])._replace(token_index=index)
        hidden, state, _ = vlm.decode(vlm.embed(inputs, None), inputs, start)

        def token(state, token):
            inputs = text_inputs(token[:, None])
            x = vlm.embed(inputs, None)
            if fused:
                logits, state = vlm.step(x, inputs, state)
            else:
                hidden, state, _ = vlm.decode(x, inputs, state)
                logits = vlm.logits(hidden)
            return state, logits[:, 0]

        return vlm.logits(hidden)[index >= 0], jax.lax.scan(token, state, tokens[:, PROMPT:].T)[1]

    return [np.float32(x) for x in run(params, tokens)]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_they_equal_separate_layers(name):
    for found, wanted in zip(
        logits_of(name, jnp.float32, True), logits_of(name, jnp.float32, False), strict=True
    ):
        assert rel_rms(found, wanted) <= 1e-5


def test_they_equal_separate_layers_in_bfloat16():
    for found, wanted in zip(
        logits_of("infinitevl", jnp.bfloat16, True),
        logits_of("infinitevl", jnp.bfloat16, False),
        strict=True,
    ):
        assert rel_rms(found, wanted) <= 1e-2


def test_names_and_values_are_the_checkpoints(tmp_path):
    config, given = CONFIGS["infinitevl"], made("infinitevl")
    model = InfiniteVL(config, given)
    assert len(model.params) == len(given) and set(model.params) == set(given)
    for name, value in given.items():
        np.testing.assert_array_equal(model.params[name], value)
    arrays = model.params.arrays
    assert "layers.0.self_attn.qkv_proj.kernel" in arrays
    assert "layers.1.self_attn.input_proj.kernel" in arrays
    for inner in ("layers.0.self_attn.qkv_proj.kernel", "layers.0.mlp.none"):
        assert inner not in model.params
    assert "visual.blocks.1.mlp.gate_up_proj.bias" in arrays
    joined = ("gate_proj", "up_proj")
    alone = {
        name for name in given if name.startswith("visual.") and name.split(".")[-2] not in joined
    }
    assert all(arrays[name] is given[name] for name in ("embed_tokens.embedding", *alone))
    save_params(tmp_path / "saved", model.params, config)
    gc.collect()  # nothing of other tests goes meanwhile
    before = live()
    again = InfiniteVL.from_pretrained(tmp_path / "saved")
    assert live() - before == sum(array.nbytes for array in again.params.arrays.values())
    jax.tree.map(np.testing.assert_array_equal, dict(again.params), given)
    assert InfiniteVL(config, model.params).params is model.params


def test_there_is_no_second_copy(monkeypatch):
    """While layers are fused, the arrays of one group at a time are there twice, and none after."""
    config = CONFIGS["infinitevl"]
    params = {name: jnp.asarray(np.asarray(p)) for name, p in made("infinitevl").items()}

    seen, join = [], fusing._join
    total = sum(p.nbytes for p in params.values())
    gc.collect()
    others = live() - total

    def watched(*arguments):
        joined = jax.block_until_ready(join(*arguments))
        seen.append((live() - others - total, joined.nbytes))
        return joined

    monkeypatch.setattr(fusing, "_join", watched)
    fused = fuse(config, params)
    assert not params and len(seen) == 9
    filled = sum(a.nbytes for a in fused.arrays.values()) - total
    assert 0 < filled < 0.2 * total
    assert all(more <= own + filled for more, own in seen)
    assert live() - others == total + filled


def test_members_of_different_kinds_stay_separate():
    config, params = CONFIGS["infinitevl"], dict(made("infinitevl"))
    params["layers.1.self_attn.a_proj.kernel"] = params["layers.1.self_attn.a_proj.kernel"].astype(
        jnp.bfloat16
    )
    fused = fuse(config, dict(params))
    names = {group.name for group in fused.groups}
    stacks = ("layers", "visual.blocks")
    gates = {f"{stack}.{i}.mlp.gate_up_proj" for stack in stacks for i in "01"}
    assert names == gates | {"layers.0.self_attn.qkv_proj"}
    for name, value in params.items():
        assert fused[name].dtype == value.dtype
        np.testing.assert_array_equal(fused[name], value)


def noted(calls, name):
    """The portable operator, which notes what it is called with."""
    run = getattr(Ops(), name)
    signature = inspect.signature(run)

    def noting(*arguments, **named):
        call = signature.bind(*arguments, **named).arguments
        around = [key for key in ("norm", "bias", "residual") if call.get(key) is not None]
        gated = name == "projection" and call["weight"].ndim == 3
        calls.append(" ".join([name, *around, *["gated"] * gated]))
        return run(*arguments, **named)

    return noting


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_a_token_is_five_operators_a_layer(untied):
    calls = []
    config = hybrid_config(layers=2, tie_word_embeddings=not untied)
    ops = Ops(
        **{f.name: noted(calls, f.name) for f in dataclasses.fields(Ops) if f.name != "dispatches"}
    )
    bind = functional(config, scanned=False, ops=ops)
    params = jax.eval_shape(partial(fuse, config), shapes(config))

    def step(params, cache, tokens):
        vlm, inputs = bind(params), text_inputs(tokens)
        return vlm.step(vlm.embed(inputs, None), inputs, cache)

    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    logits, _ = jax.eval_shape(step, params, cache_spec(config, 2, None, jnp.float32), tokens)
    assert logits.shape == (2, 1, 100)
    after = ["projection residual", "projection norm gated", "projection residual"]
    assert calls == [
        *("projection norm bias", "attention_step", *after),
        *("projection norm", "gated_delta_rule_step", *after),
        "projection norm",
    ]


def test_a_published_decoding_step_lowers_for_cuda():
    """One period of layers at the published width: each projection by the Hopper kernel, of which
    there is one for each size, and for each size of the matrix that follows."""
    config = infinitevl_4b()
    text = dataclasses.replace(config.text, layer_types=config.text.layer_types[:4])
    config = dataclasses.replace(config, text=text, vision=None)
    params = jax.eval_shape(partial(fuse, config), shapes(config, jnp.bfloat16))
    assert isinstance(params, FusedParams)
    ops = Ops(projection=hopper.projection)
    programs = Programs(functional(config, scanned=False, dtype=jnp.bfloat16, ops=ops))
    slots = jax.eval_shape(lambda: Slots.idle(8, text.vocab_size))
    cache = cache_spec(config, 8, None, jnp.bfloat16)
    traced = programs.decode.trace(params, cache, slots, steps=1)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2") == 8
    # one function for each kind of layer, called for every layer; the last has none to prefetch
    assert lowered.count("call @projection") == 3 * 4 + 1
    assert len(re.findall(r"call @apply\w*\(", lowered)) == 4
