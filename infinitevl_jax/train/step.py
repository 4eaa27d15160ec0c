"""The training step, a pure function of (state, batch)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.objective import ObjectiveConfig, SupervisedConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.patches import Patches
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import Parameter, Params, functional, parameters, unstack
from infinitevl_jax.nn.stack import Scanned
from infinitevl_jax.nn.vlm import VLM
from infinitevl_jax.sharding import (
    constrain,
    own_parts,
    parameter_shardings,
    part_size,
    spec,
)
from infinitevl_jax.train.accumulate import loss_and_gradient
from infinitevl_jax.train.objectives import Measured, objective
from infinitevl_jax.train.objectives.objective import STUDENT
from pallas_kernels import attention, gated_delta_rule

REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "dots": partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(
                *attention.RESIDUAL_NAMES, *gated_delta_rule.RESIDUAL_NAMES
            ),
        ),
    ),
    "full": jax.checkpoint,
}


class TrainState(NamedTuple):
    """State of training.

    Attributes:
      trainable: trained parameters, float32.
      frozen: other parameters.
      optimizer: optax state of `trainable`.
      step: [] int32, steps done.
    """

    trainable: Params
    frozen: Params
    optimizer: Any
    step: Array


class Metrics(NamedTuple):
    """Scalars of one step.

    Attributes:
      loss: of the global batch.
      grad_norm: before clipping.
      means: what the objective logs, by name.
    """

    loss: Array
    grad_norm: Array
    means: dict[str, Array]


Bind = Callable[[Params], VLM]
Held = Mapping[str, Params]  # parameters of the models that do not train, by the model's name
NOTHING: Mapping = MappingProxyType({})


def model_of(
    config: ModelConfig,
    run: RunConfig,
    ops: Ops | None = None,
    stacked: Scanned = True,
    lora: LoraConfig | None = None,
) -> Bind:
    """Return the function that binds stacked parameters to the model, with the run's settings.

    State and checkpoints are always stacked; without `run.scan` the stacks are split here, inside
    the step.

    Matrices of layers are cast to the activation dtype here, once per step. Casting in the layers
    gives the same result, but for every pass, and slices of the stacks and of their gradients would
    be copied in float32.

    Parameters outside of layers are gathered from the fsdp axis here, once per step. The loss runs
    over chunks of tokens and would gather the output head for each of them, in both passes.

    Args:
      stacked: layout of the parameters.
      lora: adapters among them.
    """
    dtype, scanned = jnp.dtype(run.dtype), stacked if run.scan else False
    options = {"dtype": dtype, "ops": ops, "remat": REMAT[run.remat], "lora": lora}
    bind = functional(config, scanned=scanned, **options)
    known = parameters(config, scanned=scanned, lora=lora)

    def prepare(name: str, p: Array) -> Array:
        if not known[name].in_stack:
            return constrain(p, *(None if axis == "width" else axis for axis in known[name].axes))
        wide = known[name].facts.matmul and p.dtype.itemsize > dtype.itemsize
        return p.astype(dtype) if wide else p

    def model(params: Params) -> VLM:
        params = params if run.scan else unstack(config, dict(params), stacked, lora)
        return bind({name: prepare(name, p) for name, p in params.items()})

    return model


class StageLoss:
    """An objective bound to the models of a run: what a step minimises."""

    def __init__(
        self,
        options: ObjectiveConfig,
        models: Mapping[str, Bind],
        shared: Mapping[str, Sequence[str]] = NOTHING,
    ):
        """Bind an objective.

        Args:
          models: by name; "student" is the one that trains.
          shared: names of the parameters that a model shares with the student's frozen ones.
        """
        self.options, self.models, self.shared = options, models, shared
        self.function = objective(options.name).function

    def __call__(
        self,
        trainable: Params,
        frozen: Params,
        batch: TrainBatch,
        held: Held = NOTHING,
    ) -> Measured:
        """Loss and logged means of a batch.

        Args:
          held: a model's parameters, without those that it shares with the student.
        """
        params = {STUDENT: {**trainable, **frozen}}
        for name, own in held.items():
            params[name] = {**own, **{key: frozen[key] for key in self.shared.get(name, ())}}
        models = {name: partial(bind, params[name]) for name, bind in self.models.items()}
        return self.function(models, batch, self.options)


def supervised_loss(model: Bind) -> StageLoss:
    """Cross entropy of the answers under one model."""
    return StageLoss(SupervisedConfig(), {STUDENT: model})


def train_step(
    loss: Callable[..., Measured],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: TrainBatch,
    held: Held = NOTHING,
    accumulate: int = 1,
) -> tuple[TrainState, Metrics]:
    """Update the state by the gradient of the loss over the global batch.

    If loss or gradient is not finite, the state is returned unchanged.

    Args:
      loss: a `StageLoss`. held: as it takes them.
      accumulate: parts in which the batch is taken, for less memory.
    """

    def measure(trainable, part):
        return loss(trainable, state.frozen, part, held)

    measured, gradient = loss_and_gradient(measure, state.trainable, batch, batch_axes, accumulate)
    total, logged = measured.value, measured.logged
    with jax.named_scope("optimizer"):
        update, moments = optimizer.update(gradient, state.optimizer, state.trainable)
        means = {name: mean.value for name, mean in logged.items()}
        metrics = Metrics(total, optax.global_norm(gradient), means)
        new = (optax.apply_updates(state.trainable, update), moments, state.step + 1)
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        trainable, moments, step = jax.tree.map(
            partial(jnp.where, finite), new, (state.trainable, state.optimizer, state.step)
        )
    return TrainState(trainable, state.frozen, moments, step), metrics


def init_state(
    params: Params, trainable: list[str], optimizer: optax.GradientTransformation
) -> TrainState:
    """State before the first step. Trained parameters become float32; others keep their dtype."""
    train = {name: params[name].astype(jnp.float32) for name in trainable}
    frozen = {name: value for name, value in params.items() if name not in train}
    return TrainState(train, frozen, optimizer.init(train), jnp.zeros((), jnp.int32))


def state_shardings(
    state: TrainState, parameters: Mapping[str, Parameter], mesh: Mesh
) -> TrainState:
    """Shardings of the state: parameters by logical axes, moments like their parameters.

    Args:
      state: arrays or shapes.
      parameters: the model's, stacked.
    """
    places = parameter_shardings(parameters, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def moment(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        return (
            places[name]
            if name in places and leaf.shape == state.trainable[name].shape
            else everywhere
        )

    return TrainState(
        {name: places[name] for name in state.trainable},
        {name: places[name] for name in state.frozen},
        jax.tree_util.tree_map_with_path(moment, state.optimizer),
        everywhere,
    )


def batch_axes(batch: TrainBatch) -> TrainBatch:
    """Logical axes of every leaf, in a tree shaped like the batch."""

    def inputs(x):
        rank2 = ("batch", None)
        return x._replace(
            tokens=rank2,
            token_index=rank2,
            segment_ids=rank2,
            positions=None if x.positions is None else (None, *rank2),
            vision_index=None if x.vision_index is None else rank2,
        )

    def patches(x: Patches):
        return jax.tree.map(lambda leaf: ("batch",) + (None,) * (leaf.ndim - 1), x)

    return TrainBatch(
        patches=None if batch.patches is None else patches(batch.patches),
        prefix=None if batch.prefix is None else inputs(batch.prefix),
        branches=inputs(batch.branches),
        parents=None if batch.parents is None else ("batch",),
        targets=("batch", None),
        weights=("batch", None),
    )


def batch_shardings(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Sharding of every leaf of a global batch over (data, fsdp) by its batch axis.

    Args:
      batch: this process's part of it.

    Raises:
      InfiniteVLError: the axis does not divide; replication would hide that.
    """
    return _by_leaf(lambda axes, leaf: _place(axes, leaf, mesh)[1], batch)


def put_batch(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Put a process's part of the global batch, its rows in order, on the mesh as global arrays."""
    own, _ = own_parts(mesh)

    def put(axes, leaf):
        shape, sharding = _place(axes, leaf, mesh)
        at, size = axes.index("batch"), leaf.shape[axes.index("batch")] // len(own)

        def part(index: tuple[slice, ...]):
            start = index[at].start or 0
            here = own.index(start // size) * size
            stop = here + (index[at].stop or shape[at]) - start
            return leaf[(*index[:at], slice(here, stop), *index[at + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    if batch.parents is not None and batch.prefix is not None:  # rows of the whole prefix
        size = len(batch.prefix.tokens) // len(own)
        parents = np.asarray(batch.parents)
        first = np.asarray(own, parents.dtype) * size
        batch = batch._replace(parents=first[parents // size] + parents % size)
    return _by_leaf(put, batch)


def _place(axes: tuple, leaf: Any, mesh: Mesh) -> tuple[tuple[int, ...], NamedSharding]:
    """Shape and sharding of the global array of which a process has `leaf`."""
    own, parts = own_parts(mesh)
    shape, at = list(leaf.shape), axes.index("batch")
    shape[at] = shape[at] * parts // len(own)
    part_size(shape[at] if leaf.shape[at] % len(own) == 0 else leaf.shape[at], parts)
    return tuple(shape), NamedSharding(mesh, spec(axes, tuple(shape), mesh))


def _by_leaf(make: Callable, batch: TrainBatch) -> TrainBatch:
    """make(logical axes, leaf) of every leaf."""
    return jax.tree.map(
        make, batch_axes(batch), batch, is_leaf=lambda x: isinstance(x, tuple) and "batch" in x
    )
