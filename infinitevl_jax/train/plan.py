"""A stage's training step without weights: its function and abstract inputs, for ahead-of-time
compilation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.presets import Preset
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import packed_shapes
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.inputs.patches import reach
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import Parameter, Params, parameters
from infinitevl_jax.nn.stack import Scanned
from infinitevl_jax.processing.images import ImageOptions
from infinitevl_jax.sharding import parameter_shardings
from infinitevl_jax.train.models import Teacher, common_layout
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.optimizer import learning_rate_factors, make_optimizer, split_trainable
from infinitevl_jax.train.step import (
    Held,
    StageLoss,
    TrainState,
    batch_shardings,
    init_state,
    model_of,
    state_shardings,
    train_step,
)

STEPS = 1000  # of the schedule where a preset counts epochs: they do not change the program


class StepPlan(NamedTuple):
    """A stage's training step, to be compiled or given values.

    Attributes:
      step: maps (state, batch, held) to the new state and metrics.
      state, batch, held: shapes and shardings of its arguments. What the teacher shares with the
        student is not in `held`.
      known: the student's parameters. trained: names of those that train. optimizer: of those.
    """

    step: Callable
    state: TrainState
    batch: TrainBatch
    held: Held
    known: Mapping[str, Parameter]
    trained: list[str]
    optimizer: optax.GradientTransformation


def plan_step(preset: Preset, configs: Mapping[str, ModelConfig], mesh: Mesh, ops: Ops) -> StepPlan:
    """The step of a preset for models of these sizes, by name, whatever folders it names.

    Frozen parameters and the teacher's are bfloat16. The teacher's that have the name of a frozen
    one are shared, as at the beginning of a run from one checkpoint.

    Raises:
      InfiniteVLError: the preset's patterns do not suit the student.
    """
    student, train, data = configs[STUDENT], preset.train, preset.train.data
    layout = common_layout(*configs.values())
    known = parameters(student, scanned=layout, lora=train.lora)
    factors = learning_rate_factors(known, train.trainable)
    optimizer = make_optimizer(train.optimizer, train.steps or STEPS, known, factors)
    state = abstract_state(
        student, train.trainable, optimizer, jnp.bfloat16, mesh, layout, train.lora
    )
    models = {STUDENT: model_of(student, preset.run, ops, layout, train.lora)}
    held, shared = {}, {}
    if preset.teacher is not None:
        teacher = Teacher(configs[TEACHER], Path(preset.teacher.from_), preset.teacher)
        models[TEACHER] = teacher.bind(preset.run, ops, layout)
        params = abstract_params(teacher.config, jnp.bfloat16, mesh, teacher.layout(layout))
        shared[TEACHER] = tuple(name for name in params if name in state.frozen)
        held[TEACHER] = {n: p for n, p in params.items() if n not in state.frozen}
    loss = StageLoss(train.objective, models, shared)
    patches = data.patches if student.vision else 0
    size = student.vision.patch_size**2 if student.vision else 1
    largest = (preset.model.max_pixels or ImageOptions.max_pixels) // size
    batch = abstract_batch(student, data.batch, data.length, patches, mesh, min(largest, patches))
    step = partial(train_step, loss, optimizer, accumulate=train.accumulate)
    return StepPlan(step, state, batch, held, known, list(factors), optimizer)


def abstract_state(
    config: ModelConfig,
    trainable: Sequence[str] | Mapping[str, float],
    optimizer: optax.GradientTransformation,
    dtype,
    mesh: Mesh,
    stacked: Scanned = True,
    lora: LoraConfig | None = None,
) -> TrainState:
    """Shapes and shardings of the training state.

    Args:
      trainable: patterns of the trained parameters, which are float32 with moments.
      dtype: of the frozen parameters. stacked: layout.
      lora: adapters among the parameters.
    """
    known = parameters(config, scanned=stacked, lora=lora)
    shapes = {name: jax.ShapeDtypeStruct(p.shape, dtype) for name, p in known.items()}
    names, _ = split_trainable(known, trainable)
    state = jax.eval_shape(lambda params: init_state(params, names, optimizer), shapes)
    return _placed(state, state_shardings(state, known, mesh))


def abstract_params(config: ModelConfig, dtype, mesh: Mesh, stacked: Scanned = True) -> Params:
    """Shapes and shardings of a model's parameters, such as a teacher's."""
    known = parameters(config, scanned=stacked)
    shapes = {name: jax.ShapeDtypeStruct(p.shape, dtype) for name, p in known.items()}
    return _placed(shapes, parameter_shardings(known, mesh))


def abstract_batch(
    config: ModelConfig, rows: int, length: int, patches: int, mesh: Mesh, largest: int
) -> TrainBatch:
    """Shapes and shardings of packed rows.

    Args:
      length: tokens per row.
      patches: image patches per row; 0 is text only.
      largest: patches of the largest image or frame.
    """
    inputs, vision = packed_shapes(
        config, Packing(rows, length, patches), pixel_dtype=jnp.bfloat16, slice_reach=reach(largest)
    )
    tokens = inputs.tokens
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = TrainBatch(vision, None, inputs, None, targets=tokens, weights=weights)
    return _placed(batch, batch_shardings(batch, mesh))


def _placed(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
