"""A layer type defined in this file alone: an exponential moving average."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from tiny_folder import tiny_config, tiny_model, write_folder

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import export_folder, import_folder
from infinitevl_jax.cli import info
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import SLIDING, TextConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.initializers import ones
from infinitevl_jax.nn.layers import Linear
from infinitevl_jax.nn.lora import initialize_adapters, is_adapter
from infinitevl_jax.nn.mixers import Mixer, register_mixer
from infinitevl_jax.nn.ops import Ops, resolve_ops
from infinitevl_jax.nn.parameter import parameter
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.sharding import constrain, make_mesh, parameter_shardings
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.step import (
    init_state,
    model_of,
    put_batch,
    state_shardings,
    supervised_loss,
    train_step,
)
from pallas_kernels.testing.parity import rel_rms

KIND = "moving_average"


class MovingAverage(Mixer):
    """y_t = d y_(t-1) + (1 - d) x_t, then a projection; d = sigmoid(decay) per channel."""

    def __init__(self, config: TextConfig, ops: Ops):
        self.width = config.hidden_size
        self.decay = parameter((self.width,), ones, (None,), decay=False)
        self.proj = Linear(self.width, self.width, ("width", "hidden"))

    def state_spec(self, batch: int, max_length: int | None, dtype) -> Array:
        return jax.ShapeDtypeStruct((batch, self.width), jnp.float32)

    def __call__(
        self, x: Array, state: Array | None, tokens: TokenInfo
    ) -> tuple[Array, Array | None]:
        d = jax.nn.sigmoid(self.decay[...].astype(jnp.float32))
        valid, first = tokens.token_index >= 0, tokens.token_index == 0
        keep = jnp.where(valid[..., None], jnp.where(first[..., None], 0.0, d), 1.0)
        add = jnp.where(valid[..., None], (1 - d) * x.astype(jnp.float32), 0.0)
        if state is not None:
            add = add.at[:, 0].add(keep[:, 0] * state)

        def join(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        y = jax.lax.associative_scan(join, (keep, add), axis=1)[1]
        y = constrain(y, "batch", "length", None)
        return self.proj(y.astype(x.dtype)), None if state is None else y[:, -1]


register_mixer(KIND, MovingAverage, title="moving average")
CONFIG = tiny_config(layer_types=(KIND, SLIDING, KIND, SLIDING))
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("toy") / "toy", model)


def batch(rows):
    tokens = np.random.default_rng(0).integers(1, 90, (rows, 24))
    inputs = build_inputs(CONFIG, tokens).decoder
    weights = np.ones(tokens.shape, np.float32)
    return TrainBatch(None, None, inputs, None, np.roll(tokens, -1, 1).astype(np.int32), weights)


def train(run, optimizer=None, steps=STEPS, lora=None):
    mesh, known = make_mesh(run), parameters(CONFIG, scanned=True, lora=lora)
    config = OptimizerConfig(peak_lr=3e-2, warmup=0.0)
    optimizer = optimizer or make_optimizer(config, steps, known)
    with jax.set_mesh(mesh):
        params = initialize(CONFIG, jax.random.key(0), scanned=True)
        params |= initialize_adapters(known, jax.random.key(1))
        params = jax.device_put(params, parameter_shardings(known, mesh))
        state = init_state(params, [n for n in params if not lora or is_adapter(n)], optimizer)
        state = jax.device_put(state, state_shardings(state, known, mesh))
        loss = supervised_loss(model_of(CONFIG, run, resolve_ops(mesh), lora=lora))
        step = jax.jit(partial(train_step, loss, optimizer))
        data, losses = put_batch(batch(8), mesh), []
        for _ in range(steps):
            state, metrics = step(state, data)
            losses.append(float(metrics.loss))
    return state, losses


def test_it_trains_scanned_and_unrolled():
    _, scanned = train(RunConfig(fsdp=1))
    _, unrolled = train(RunConfig(fsdp=1, scan=False))
    assert scanned[-1] < 0.5 * scanned[0]
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4)


def test_an_adapter_of_its_projection_trains():
    lora = LoraConfig(rank=4, alpha=16, targets=(r"layers\..*\.proj",))
    state, losses = train(RunConfig(fsdp=1), lora=lora)
    trained = {
        layer
        for n in state.trainable
        for layer in parameters(CONFIG, scanned=True, lora=lora)[n].layers
    }
    assert trained == {f"layers.{i}.self_attn.proj.lora_{s}" for i in (0, 2) for s in "ab"}
    assert losses[-1] < 0.99 * losses[0]


def test_it_is_sharded():
    known, mesh = parameters(CONFIG, scanned=True), make_mesh(RunConfig(fsdp=4, tensor=2))
    name = "layers.blocks.0.self_attn.proj.kernel"  # two layers of a scan
    assert known[name].layers == tuple(f"layers.{i}.self_attn.proj.kernel" for i in (0, 2))
    assert parameter_shardings(known, mesh)[name].spec == PartitionSpec(None, "fsdp", "tensor")
    keep_gradient = optax.trace(0.0)
    alone, one = train(RunConfig(fsdp=1), keep_gradient, steps=1)
    spread, eight = train(RunConfig(fsdp=4, tensor=2), keep_gradient, steps=1)
    assert abs(one[0] - eight[0]) <= 1e-5 * one[0]
    for key, gradient in alone.optimizer.trace.items():
        assert rel_rms(spread.optimizer.trace[key], gradient) <= 1e-5, key


def test_only_the_projection_decays():
    facts = {n: p.facts.decay for n, p in parameters(CONFIG, scanned=False).items() if ".0.s" in n}
    assert facts == {
        "layers.0.self_attn.decay": False,
        "layers.0.self_attn.proj.kernel": True,
    }


def test_it_decodes_from_its_cache(model):
    """It declares nothing of its layers, and none of them is fused."""
    fused = {group.name for group in model.params.groups}
    assert "layers.1.self_attn.qkv_proj" in fused and "layers.0.mlp.gate_up_proj" in fused
    assert not any(name.startswith("layers.0.self_attn") for name in fused)
    tokens = np.random.default_rng(1).integers(1, 90, (2, 40))
    whole = model(tokens).logits
    first = model(tokens[:, :17], use_cache=True)
    rest = model(tokens[:, 17:39], cache=first.cache)
    last = model(tokens[:, 39:], cache=rest.cache)
    found = np.concatenate([first.logits, rest.logits, last.logits], 1)
    assert rel_rms(found, whole) <= 1e-5
    alone = model.generate(tokens[:1], max_new_tokens=8)
    again = [model(np.concatenate([tokens[:1], alone[:, :n]], 1)).logits[:, -1] for n in range(8)]
    assert [int(np.argmax(x[0])) for x in again] == np.asarray(alone)[0].tolist()


def test_padding_and_packing_leave_it_alone(model):
    tokens = np.random.default_rng(2).integers(1, 90, (1, 30))
    mask = np.ones((2, 40), int)
    mask[0, :10] = 0
    both = np.concatenate([np.pad(tokens, ((0, 0), (10, 0))), np.pad(tokens, ((0, 0), (0, 10)))])
    mask[1, 30:] = 0
    padded = model(both, attention_mask=mask).logits
    alone = model(tokens).logits[0]
    assert rel_rms(padded[0, 10:], alone) <= 1e-5 and rel_rms(padded[1, :30], alone) <= 1e-5


def test_info_shows_it(folder, model):
    facts = info.describe(folder)
    width = CONFIG.text.hidden_size
    assert facts["layers"] == {"moving average": 2, "window attention": 2}
    assert facts["parts"]["moving average mixers"]["parameters"] == 2 * (width + width * width)
    assert facts["cache"]["bytes"]["1000"] == model.init_cache(1).nbytes
    assert f"2 layers x ({width} x 4 bytes)" in facts["cache"]["formula"]
    assert "moving average mixers" in info.as_table(facts)


def test_it_goes_to_a_torch_folder_and_back(folder, model, tmp_path):
    export_folder(folder, tmp_path / "torch")
    tensors = load_file(tmp_path / "torch" / "model.safetensors")
    params = model.params
    np.testing.assert_array_equal(
        tensors["model.layers.2.self_attn.decay"], params["layers.2.self_attn.decay"]
    )
    np.testing.assert_array_equal(
        tensors["model.layers.2.self_attn.proj.weight"],
        np.asarray(params["layers.2.self_attn.proj.kernel"]).T,
    )
    import_folder(tmp_path / "torch", tmp_path / "back")
    again = InfiniteVL.from_pretrained(tmp_path / "back")
    assert again.config == dataclasses.replace(model.config)
    for name, value in params.items():
        np.testing.assert_array_equal(again.params[name], value)
