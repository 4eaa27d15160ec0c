"""A step on meshes of 8 devices equals that on one: loss, gradients, shardings."""

import dataclasses
from collections import namedtuple
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import PRESET, write_preset

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import train_batches
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.sharding import kept_whole, make_mesh, parameter_shardings
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import (
    init_state,
    model_of,
    put_batch,
    state_shardings,
    supervised_loss,
    train_step,
)
from pallas_kernels.testing.parity import rel_rms

# all matrix sides are multiples of 8
SIZES = (
    ("hidden_size = 32", "hidden_size = 64"),
    ("out_hidden_size = 32", "out_hidden_size = 64"),
    ("head_dim = 8", "head_dim = 16"),
    ("[2, 1, 1]", "[4, 2, 2]"),
    ("num_linear_heads = 2", "num_linear_heads = 8"),
    ("num_key_value_heads = 2", "num_key_value_heads = 4"),
    ("linear_head_dim = 16", "linear_head_dim = 8"),
    ("num_heads = 2", "num_heads = 8"),
    ("intermediate_size = 48", "intermediate_size = 64"),
)


class Setting:
    """A model, a batch of each form, and their results on one device."""

    def __init__(self, folder, data):
        text = PRESET
        for old, new in SIZES:
            text = text.replace(old, new)
        text = text.replace("\n\n[model.vision]", "\ntie_word_embeddings = false\n\n[model.vision]")
        preset = load_preset(write_preset(folder, data, text))
        source = Dataset("tiny_vqa", data, "train")
        start = prepare_start(preset.model, source, folder, 0)
        # a vocabulary size that 8 divides
        self.config = dataclasses.replace(
            start.config, text=dataclasses.replace(start.config.text, vocab_size=64)
        )
        encoder = Encoder(source, start.processor, self.config)
        packed = dataclasses.replace(preset.train.data, questions=0, length=64, patches=64)
        self.batches = {
            "branches": next(train_batches(encoder, self.config, preset.train.data, 0)),
            "rows": next(train_batches(encoder, self.config, packed, 0)),
        }
        self.known = parameters(self.config, scanned=True)
        self.params = initialize(self.config, jax.random.key(0), scanned=True)
        self.alone = cache(lambda form: self.step(RunConfig(fsdp=1), form))

    def step(self, run, form):
        mesh = make_mesh(run)
        with jax.set_mesh(mesh):
            optimizer = optax.trace(0.0)  # keeps the gradient as its state
            params = jax.device_put(self.params, parameter_shardings(self.known, mesh))
            state = init_state(params, list(params), optimizer)
            state = jax.device_put(state, state_shardings(state, self.known, mesh))
            # code optimisation takes most of the compile time and is not tested here
            options = {"xla_backend_optimization_level": 0}
            step = jax.jit(
                partial(
                    train_step,
                    supervised_loss(model_of(self.config, run, resolve_ops(mesh))),
                    optimizer,
                ),
                compiler_options=options,
            )
            new, metrics = step(state, put_batch(self.batches[form], mesh))
        return new, metrics, {name: np.asarray(g) for name, g in new.optimizer.trace.items()}


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_data):
    return Setting(tmp_path_factory.mktemp("mesh"), tiny_data)


@pytest.mark.parametrize(
    "fsdp,tensor,form,scan", [(4, 2, "branches", True), (2, 4, "rows", True), (8, 1, "rows", False)]
)
def test_loss_and_gradients_agree(setting, fsdp, tensor, form, scan):
    new, metrics, gradient = setting.step(RunConfig(fsdp=fsdp, tensor=tensor, scan=scan), form)
    _, alone, expected = setting.alone(form)
    assert abs(float(metrics.loss) - float(alone.loss)) <= 1e-5 * float(alone.loss)
    assert abs(float(metrics.grad_norm) - float(alone.grad_norm)) <= 1e-5 * float(alone.grad_norm)
    for name, wanted in expected.items():
        assert rel_rms(gradient[name], wanted) <= 1e-5, name
    for name, value in new.trainable.items():
        if value.size >= 4096:
            shard = value.addressable_shards[0].data
            assert shard.size * 8 == value.size, f"{name} {value.shape} has shards of {shard.shape}"


def test_moments_live_with_their_parameters(setting):
    mesh = make_mesh(RunConfig(fsdp=4, tensor=2))
    optimizer = make_optimizer(OptimizerConfig(), 10, setting.known)
    shapes = jax.eval_shape(lambda p: init_state(p, list(p), optimizer), setting.params)
    places = state_shardings(shapes, setting.known, mesh)
    moments = [s for s in jax.tree.leaves(places.optimizer) if s.spec]
    assert len(moments) >= 2 * sum(bool(s.spec) for s in places.trainable.values())
    adam = places.optimizer[1]
    for name, place in places.trainable.items():
        assert adam.mu[name] == place and adam.nu[name] == place


def test_open_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(RunConfig(tensor=2)).shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "context": 1,
    }
    assert dict(make_mesh(RunConfig(fsdp=2, data=-1)).shape) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
        "context": 1,
    }
    assert make_mesh(RunConfig(fsdp=1)).size == 1  # fewer devices than available


def test_matrices_that_no_axis_divides_are_told():
    parameter = namedtuple("parameter", ["shape", "axes"])
    shapes = {
        "layers.0.mlp.up_proj.kernel": parameter((30, 66), ("width", "hidden")),
        "norm.weight": parameter((30,), (None,)),
    }
    assert kept_whole(shapes, make_mesh(RunConfig(fsdp=2, tensor=4))) == []  # 30 divides by 2
    (line,) = kept_whole(shapes, make_mesh(RunConfig(fsdp=8)))
    assert line == "layers.0.mlp.up_proj.kernel [30, 66]: no side divides by fsdp 8"
    assert kept_whole(shapes, make_mesh(RunConfig(fsdp=1))) == []


def test_f32_masters_only_for_what_trains(setting):
    half = {name: p.astype(jnp.bfloat16) for name, p in setting.params.items()}
    names = [n for n in half if "self_attn" in n]
    state = init_state(half, names, optax.adam(1e-3))
    assert {p.dtype for p in state.trainable.values()} == {jnp.dtype("float32")}
    assert {p.dtype for p in state.frozen.values()} == {jnp.dtype("bfloat16")}
    assert set(state.optimizer[0].mu) == set(names)
