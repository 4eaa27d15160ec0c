"""Gradients of a batch that is taken in several parts, one after the other.

The loss of a batch is a sum of means, each a ratio of two sums over the whole batch. So parts with
more answer tokens count for more, and the result is that of the batch taken at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.config.train import TrainConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import Params
from infinitevl_jax.sharding import batch_parts, constrain, own_parts, part_size
from infinitevl_jax.train.objectives import Mean, Measured


def loss_and_gradient(
    loss: Callable[[Params, TrainBatch], Measured],
    trainable: Params,
    batch: TrainBatch,
    axes: Callable[[TrainBatch], TrainBatch],
    count: int,
) -> tuple[Measured, Params]:
    """What an objective finds in a batch, and the gradient of its loss.

    Args:
      loss: of trained parameters and a batch. The weights of its terms may depend on the batch
        only.
      axes: gives the logical axes of a batch's leaves.
      count: parts, which divide the rows of every device.
    """
    if count == 1:

        def whole(trainable):
            measured = loss(trainable, batch)
            return measured.value, measured

        (_, measured), gradient = jax.value_and_grad(whole, has_aux=True)(trainable)
        return measured, gradient

    parts = split(batch, axes(batch), count)
    shapes = jax.eval_shape(lambda: loss(trainable, jax.tree.map(lambda x: x[0], parts)))
    # The factor of a single term is applied at the end. Of several, the ratio has to be known
    # before: their weights follow from the batch, and the compiler removes the models.
    single = len(shapes.loss) == 1
    factors = [1.0] if single else [_inverse(term) for term in loss(trainable, batch).loss]

    def value(trainable, part):
        measured = loss(trainable, part)
        terms = zip(factors, measured.loss, strict=True)
        return sum(factor * term.total for factor, term in terms), measured

    def step(sums, part):
        (_, measured), gradient = jax.value_and_grad(value, has_aux=True)(trainable, part)
        return jax.tree.map(jnp.add, sums, (measured, gradient)), None

    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes, trainable))
    (measured, gradient), _ = jax.lax.scan(step, nothing, parts)
    if single:
        gradient = jax.tree.map(lambda x: x * _inverse(measured.loss[0]), gradient)
    return measured, gradient


def check_accumulation(mesh: Mesh, config: TrainConfig) -> None:
    """Raise InfiniteVLError if the parts do not divide the rows of each device."""
    batch, parts = config.data.batch, own_parts(mesh)[1]
    if part_size(batch, parts) % config.accumulate:
        raise InfiniteVLError(
            f"train.accumulate is {config.accumulate}, a device has {batch // parts} of the"
            f" {batch} rows of a batch",
            "choose a divisor of that, or another train.data.batch",
        )


def _inverse(mean: Mean) -> Array:
    return 1 / jnp.where(mean.weight > 0, mean.weight, 1)


def split(batch: TrainBatch, axes: TrainBatch, count: int) -> TrainBatch:
    """A batch as `count` parts along a new leading axis. Each device keeps its rows.

    Of branches, the rows of a prefix and of its questions are in the same part if each prefix has
    as many rows of branches, in order, as `data.collate.branch_batch` lays them out.
    """
    shards = batch_parts()

    def cut(names: tuple, x: Any) -> Array:
        at = names.index("batch")
        x = jnp.moveaxis(jnp.asarray(x), at, 0)
        x = x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1)
        x = jnp.moveaxis(x.reshape(count, -1, *x.shape[3:]), 1, at + 1)
        return constrain(x, None, *names)

    parts = _by_leaf(cut, axes, batch)
    if batch.parents is None or batch.prefix is None:
        return parts
    size = len(batch.prefix.tokens) // shards // count  # of a device, in a part
    shard, within = jnp.divmod(parts.parents, size * count)
    return parts._replace(parents=shard * size + within % size)


_by_leaf = partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple) and "batch" in x)
