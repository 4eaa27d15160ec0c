"""Gradients of adapters are those of the merged weights by the chain rule, dA = s dW B^T and
dB = s A^T dW: with every objective, packed, on meshes, scanned or unrolled. The base keeps its
bits."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import hybrid_config
from tiny_stage import OBJECTIVES, SIZES

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, infinitevl_4b
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import ADAPTERS, OptimizerConfig
from infinitevl_jax.data.collate import packed_batch
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.lora import is_adapter, merge_adapters
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.plan import abstract_state
from infinitevl_jax.train.step import (
    StageLoss,
    init_state,
    model_of,
    put_batch,
    state_shardings,
    train_step,
)
from pallas_kernels.testing.parity import rel_rms

ALONE = RunConfig(fsdp=1)


class Setting:
    """A student with a bfloat16 base and random adapters, a teacher, and conversations packed and
    in rows of their own."""

    def __init__(self):
        config = dataclasses.replace(hybrid_config(layer_types=(SLIDING, LINEAR) * 2), vision=None)
        text = dataclasses.replace(config.text, **SIZES)
        student = dataclasses.replace(config, text=text)
        text = dataclasses.replace(text, layer_types=(FULL,) * 4)
        self.configs = {STUDENT: student, TEACHER: dataclasses.replace(config, text=text)}
        self.layout = common_layout(*self.configs.values())
        self.lora = LoraConfig(rank=4, alpha=6.0, use_rslora=True)
        key, rng = jax.random.key(0), np.random.default_rng(0)
        self.base = initialize(student, key, scanned=self.layout, dtype=jnp.bfloat16)
        self.teacher = initialize(self.configs[TEACHER], key, scanned=self.layout)
        known = parameters(student, scanned=self.layout, lora=self.lora)
        self.adapters = {
            name: jnp.asarray(0.3 * rng.normal(size=p.shape) * p.shape[-2] ** -0.5, jnp.float32)
            for name, p in known.items()
            if is_adapter(name)
        }
        found = [
            EncodedConversation(
                Branch(rng.integers(1, 60, n).astype(np.int32), np.arange(n) > n // 2, ("", ""))
            )
            for n in rng.integers(5, 10, 16)
        ]
        packed = Packing(8, 20, 0)
        for i, each in enumerate(found):
            packed.put(i // 2, each.tokens)
        separate = Packing.one_per_row([each.tokens for each in found], 20, patches=0)
        self.packed, self.separate = (packed_batch(found, p, student) for p in (packed, separate))
        self.expected = {}

    def step(self, run, name, params, lora, trained, batch):
        """State after a step that keeps the gradient, metrics, and the gradient."""
        mesh, optimizer = make_mesh(run), optax.trace(0.0)
        objective = OBJECTIVES[name]
        with jax.set_mesh(mesh):
            ops, models, held = resolve_ops(mesh), {}, {}
            known = parameters(self.configs[STUDENT], scanned=self.layout, lora=lora)
            state = init_state(params, trained, optimizer)
            state = jax.device_put(state, state_shardings(state, known, mesh))
            models[STUDENT] = model_of(self.configs[STUDENT], run, ops, self.layout, lora)
            if name != "supervised":
                theirs = parameters(self.configs[TEACHER], scanned=self.layout)
                held[TEACHER] = jax.device_put(self.teacher, parameter_shardings(theirs, mesh))
                models[TEACHER] = model_of(self.configs[TEACHER], run, ops, self.layout)
            options = {"xla_backend_optimization_level": 0}
            step = partial(train_step, StageLoss(objective, models), optimizer)
            step = jax.jit(step, compiler_options=options)
            new, metrics = step(state, put_batch(batch, mesh), held=held)
        return new, metrics, {n: np.asarray(g, float) for n, g in new.optimizer.trace.items()}

    def wanted(self, name):
        """Loss, and the adapters' gradients, of conversations in rows of their own."""
        if name not in self.expected:
            wide = {n: p.astype(jnp.float32) for n, p in self.base.items()}
            merged = merge_adapters(wide | self.adapters, 3.0)
            kernels = sorted({f"{n.rpartition('.')[0]}.kernel" for n in self.adapters})
            _, metrics, found = self.step(ALONE, name, merged, None, kernels, self.separate)
            gradient = {}
            for kernel in kernels:
                module, dw = kernel.rpartition(".")[0], found[kernel]
                a, b = (np.asarray(self.adapters[f"{module}.lora_{s}"], float) for s in "ab")
                gradient[f"{module}.lora_a"] = 3.0 * dw @ b.swapaxes(-1, -2)
                gradient[f"{module}.lora_b"] = 3.0 * a.swapaxes(-1, -2) @ dw
            self.expected[name] = float(metrics.loss), gradient
        return self.expected[name]


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.mark.parametrize(
    "name,sizes,options",
    [
        ("supervised", (1, 1, 1), {"scan": False, "remat": "dots"}),
        ("supervised", (2, 2, 2), {"remat": "full"}),
        ("distill", (1, 2, 4), {}),
        ("layerwise", (1, 8, 1), {}),
    ],
)
def test_gradients(setting, name, sizes, options):
    data, fsdp, tensor = sizes
    run = RunConfig(data=data, fsdp=fsdp, tensor=tensor, **options)
    params = setting.base | setting.adapters
    trained = list(setting.adapters)
    new, metrics, found = setting.step(run, name, params, setting.lora, trained, setting.packed)
    loss, expected = setting.wanted(name)
    assert abs(float(metrics.loss) - loss) <= 1e-5 * loss
    assert found.keys() == expected.keys()
    assert sum(wanted.any() for wanted in expected.values()) >= 16
    for parameter, wanted in expected.items():
        assert rel_rms(found[parameter], wanted) <= 1e-5, parameter
    for parameter, value in setting.base.items():
        kept = new.frozen[parameter]
        assert kept.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(value))


def test_adapters_are_sharded_like_their_layer(setting):
    known = parameters(setting.configs[STUDENT], scanned=setting.layout, lora=setting.lora)
    places = parameter_shardings(known, make_mesh(RunConfig(fsdp=4, tensor=2)))
    module = "layers.blocks.1.self_attn."
    specs = {
        side: [tuple(places[f"{module}{name}_proj.{side}"].spec) for name in "qo"]
        for side in ("kernel", "lora_a", "lora_b")
    }
    assert specs["kernel"] == [(None, "fsdp", "tensor"), (None, "tensor", "fsdp")]
    assert specs["lora_a"] == [(None, "fsdp", None), (None, "tensor", None)]
    assert specs["lora_b"] == [(None, None, "tensor"), (None, None, "fsdp")]


def test_only_adapters_of_the_published_model_have_masters_and_moments():
    """Of its 8.8 GB of weights in bfloat16 nothing is copied."""
    config, lora = infinitevl_4b(), LoraConfig()
    known = parameters(config, scanned=True, lora=lora)
    optimizer = make_optimizer(OptimizerConfig(), 10, known)
    mesh = make_mesh(RunConfig(fsdp=8))
    state = abstract_state(config, [ADAPTERS], optimizer, jnp.bfloat16, mesh, lora=lora)
    plain = parameters(config, scanned=False)
    targets = [re.compile(pattern + r"\.kernel") for pattern in lora.targets]
    kernels = [p for n, p in plain.items() if any(target.fullmatch(n) for target in targets)]
    assert len(kernels) == 9 * (4 + 3) + 27 * (5 + 3)
    trained = sum(64 * sum(kernel.shape) for kernel in kernels)
    assert sum(x.size for x in state.trainable.values()) == trained
    assert {x.dtype for x in state.trainable.values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    assert sum(x.size for x in state.frozen.values()) == sum(p.size for p in plain.values())
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert sum(x.size for x in moments) == 2 * trained
