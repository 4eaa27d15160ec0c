"""Compilation of the full-size training step for a TPU pod on a CPU, and its collectives."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp

from infinitevl_jax.config.model import FULL, infinitevl_4b
from infinitevl_jax.config.objective import ObjectiveConfig, SupervisedConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives import objective
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.plan import abstract_batch, abstract_params, abstract_state
from infinitevl_jax.train.step import StageLoss, model_of, train_step
from pallas_kernels.testing.pods import PodReport, compile_for_pod, pod_mesh

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
TRAINABLE = [r"layers\..*", r"norm\.weight"]
SUPERVISED = SupervisedConfig()


def compile_step(
    topology: str,
    *,
    rows: int = 64,
    length: int = 8192,
    patches: int = 4096,
    tensor: int = 1,
    options: ObjectiveConfig = SUPERVISED,
    trainable: Sequence[str] = TRAINABLE,
    compiler_options: Mapping[str, Any] | None = None,
) -> tuple[PodReport, list[str]]:
    """Compile a training step of the published size for a pod.

    The teacher of an objective has full attention, and shares all frozen parameters. All chips that
    `tensor` does not use are on the axis `fsdp`. Returns the report of the compiler and the
    operators that run.
    """
    config, run = infinitevl_4b(), RunConfig(dtype="bfloat16", remat="full")
    mesh = pod_mesh(topology, {"data": 1, "fsdp": -1, "tensor": tensor, "context": 1})
    text = dataclasses.replace(config.text, layer_types=(FULL,) * config.text.num_hidden_layers)
    configs = {STUDENT: config, TEACHER: dataclasses.replace(config, text=text)}
    configs = {name: configs[name] for name in objective(options.name).models}
    stacked = common_layout(*configs.values())
    optimizer = make_optimizer(OptimizerConfig(), 1000, parameters(config, scanned=stacked))
    state = abstract_state(config, trainable, optimizer, jnp.bfloat16, mesh, stacked)
    batch = abstract_batch(config, rows, length, patches, mesh)
    ops = resolve_ops(mesh)
    held, shared = {}, {}
    if TEACHER in configs:
        params = abstract_params(configs[TEACHER], jnp.bfloat16, mesh, stacked)
        shared[TEACHER] = tuple(name for name in params if name in state.frozen)
        held[TEACHER] = {n: p for n, p in params.items() if n not in state.frozen}
    models = {name: model_of(each, run, ops, stacked) for name, each in configs.items()}
    step = partial(train_step, StageLoss(options, models, shared), optimizer)
    arguments = state, batch, held
    settings = {"donate_argnums": 0, "text": True, "compiler_options": compiler_options}
    return compile_for_pod(step, mesh, *arguments, **settings), ops.report()


def collectives(hlo: str) -> Counter[tuple[str, str]]:
    """Count (collective, result) pairs, such as ("all-gather", "bf16[2048,11008]"), in a program.

    A collective with several results counts once for each. An asynchronous one
    (`all-gather-start`) also counts its operands.
    """
    found = re.findall(rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    return Counter(
        (kind, shape) for result, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", result)
    )


def of_rows(found: Iterable[tuple[str, str]], length: int) -> list[str]:
    """Collectives whose result has the row length as a dimension, that is, not parameters."""
    return sorted(
        f"{kind} {shape}" for kind, shape in found if re.search(rf"[\[,]{length}[,\]]", shape)
    )
