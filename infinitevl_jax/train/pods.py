"""Compilation of the full-size training step for a TPU pod on a CPU, and its collectives."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial

import jax.numpy as jnp

from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.optimizer import make_optimizer
from infinitevl_jax.train.plan import abstract_batch, abstract_state
from infinitevl_jax.train.step import model_of, supervised_loss, train_step
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


def compile_step(
    topology: str, *, rows: int = 64, length: int = 8192, patches: int = 4096, tensor: int = 1
) -> tuple[PodReport, list[str]]:
    """Compile the training step of the published size for a pod.

    All chips that `tensor` does not use are on the axis `fsdp`. Returns the report of the compiler
    and the operators that run.
    """
    config, run = infinitevl_4b(), RunConfig(dtype="bfloat16", remat="full")
    mesh = pod_mesh(topology, {"data": 1, "fsdp": -1, "tensor": tensor, "context": 1})
    optimizer = make_optimizer(OptimizerConfig(), 1000, parameters(config, scanned=True))
    state = abstract_state(config, TRAINABLE, optimizer, jnp.bfloat16, mesh)
    batch = abstract_batch(config, rows, length, patches, mesh)
    ops = resolve_ops(mesh)
    step = partial(train_step, supervised_loss(model_of(config, run, ops)), optimizer)
    return compile_for_pod(step, mesh, state, batch, donate_argnums=0, text=True), ops.report()


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
