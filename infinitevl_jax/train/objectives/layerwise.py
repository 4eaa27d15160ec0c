"""Layer-wise distillation: every mixer of the student against the teacher's (stage I-1)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.objective import LayerwiseConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.forward import run_layers
from infinitevl_jax.train.objectives.objective import (
    STUDENT,
    TEACHER,
    Mean,
    Measured,
    Models,
    register_objective,
)


def layerwise(models: Models, batch: TrainBatch, options: LayerwiseConfig) -> Measured:
    """Mean distance over real tokens and compared layers, times a factor.

    The teacher runs once. Each student layer gets the teacher's input of that layer, through its
    own norm. Logs the squared error as a share of the teacher's squared outputs (`relative_error`).
    """
    of_student = models[STUDENT]()
    remat, dtype = of_student.layers.remat, of_student.dtype

    def compare(teacher, student, x, states, infos):
        wanted, teacher_state = teacher.mix(x, states[0], infos[0])
        valid = infos[0].token_index >= 0

        @remat
        def error(x, wanted, state):
            got, state = student.mix(x.astype(dtype), state, infos[1])
            return _sums(got, wanted, valid, options.distance), state

        sums, student_state = error(x, wanted, states[1])
        return teacher.add(x, wanted), (teacher_state, student_state), sums

    found = run_layers((models[TEACHER], models[STUDENT]), batch, compare)
    types = of_student.config.text.layer_types
    chosen = [found[layer] for layer in compared(types, options)]
    distance, error, size, tokens = map(sum, zip(*chosen, strict=True))
    return Measured(
        (Mean(options.factor * distance, tokens),),
        {"relative_error": Mean(error, size)},
    )


def _sums(got: Array, wanted: Array, valid: Array, distance: str) -> tuple[Array, ...]:
    """Sums over the real tokens: distance, squared error, squared output, 1."""
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    square = jnp.sum((got - wanted) ** 2, -1)
    mean = square / got.shape[-1]
    if distance == "norm":  # its gradient at 0 is taken as 0
        mean = jnp.where(mean > 0, jnp.sqrt(jnp.where(mean > 0, mean, 1)), 0)
    sums = (mean, square, jnp.sum(wanted**2, -1), jnp.ones_like(mean))
    return tuple(jnp.sum(jnp.where(valid, x, 0)) for x in sums)


def compared(types: tuple[str, ...], options: LayerwiseConfig) -> list[int]:
    """Numbers of the compared layers of a student with layers of these types."""
    return [
        layer
        for layer, kind in enumerate(types)
        if (not options.layers or layer in options.layers)
        and (not options.layer_types or kind in options.layer_types)
    ]


def check(configs: Mapping[str, ModelConfig], options: LayerwiseConfig) -> None:
    """Both have the same depth and width, and some layer is compared."""
    student, teacher = configs[STUDENT].text, configs[TEACHER].text
    for what in ("num_hidden_layers", "hidden_size"):
        sizes = getattr(student, what), getattr(teacher, what)
        if sizes[0] != sizes[1]:
            raise InfiniteVLError(
                f"{what} is {sizes[0]} in the student, {sizes[1]} in the teacher",
                "the layers of both are compared one by one: derive the student from the teacher"
                " ([model.mixers])",
            )
    unknown = [layer for layer in options.layers if layer >= student.num_hidden_layers]
    unknown += [kind for kind in options.layer_types if kind not in student.layer_types]
    if unknown or not compared(student.layer_types, options):
        raise InfiniteVLError(
            f"train.objective: the student has no layer {unknown[0] if unknown else 'of both'}",
            f"it has {student.num_hidden_layers} layers of the types"
            f" {', '.join(sorted(set(student.layer_types)))}",
        )


def reached(name: str, student: ModelConfig, options: LayerwiseConfig) -> bool:
    """Whether a parameter belongs to the mixer of a compared layer, or to the norm before it."""
    stack, number, part, *_ = (*name.split("."), "", "")
    layers = compared(student.text.layer_types, options)
    return stack == "layers" and part in ("self_attn", "input_layernorm") and int(number) in layers


register_objective(
    "layerwise",
    layerwise,
    options=LayerwiseConfig,
    models=(STUDENT, TEACHER),
    check=check,
    reached=reached,
)
