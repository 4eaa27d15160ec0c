"""Compilation of a stage's full-size training step for a TPU pod on a CPU, and its collectives."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from infinitevl_jax.config.model import ModelConfig, infinitevl_4b, qwen2_5_vl_3b
from infinitevl_jax.config.presets import Preset
from infinitevl_jax.config.run import AXES
from infinitevl_jax.config.student import derive
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.train.objectives import objective
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.plan import plan_step
from pallas_kernels.testing.hlo import COLLECTIVES
from pallas_kernels.testing.pods import PodReport, compile_for_pod, pod_mesh


def published_models(preset: Preset) -> dict[str, ModelConfig]:
    """The models of a stage by name, of the published sizes, whatever folders the preset names."""
    teacher, mixers = qwen2_5_vl_3b(), preset.model.mixers
    student = derive(teacher, mixers) if mixers else infinitevl_4b()
    found = {STUDENT: student, TEACHER: teacher}
    return {name: found[name] for name in objective(preset.train.objective.name).models}


def compile_step(
    topology: str, preset: Preset, compiler_options: Mapping[str, Any] | None = None
) -> tuple[PodReport, list[str]]:
    """Compile a preset's training step, with models of the published size, for a pod.

    Returns the report of the compiler and the operators that run.
    """
    mesh = pod_mesh(topology, {axis: getattr(preset.run, axis) for axis in AXES})
    ops = resolve_ops(mesh, preset.run.ops)
    plan = plan_step(preset, published_models(preset), mesh, ops)
    arguments = plan.state, plan.batch, plan.held
    settings = {"donate_argnums": 0, "text": True, "compiler_options": compiler_options}
    return compile_for_pod(plan.step, mesh, *arguments, **settings), ops.report()


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
