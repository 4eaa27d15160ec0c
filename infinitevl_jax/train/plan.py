"""Abstract inputs of a training step, for ahead-of-time compilation."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import packed_shapes
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.optimizer import split_trainable
from infinitevl_jax.train.step import TrainState, batch_shardings, init_state, state_shardings


def abstract_state(
    config: ModelConfig,
    trainable: Sequence[str] | Mapping[str, float],
    optimizer: optax.GradientTransformation,
    dtype,
    mesh: Mesh,
    lora: LoraConfig | None = None,
) -> TrainState:
    """Shapes and shardings of the training state.

    Args:
      trainable: patterns of the trained parameters, which are float32 with moments.
      dtype: of the frozen parameters.
      lora: adapters among the parameters.
    """
    known = parameters(config, scanned=True, lora=lora)
    shapes = {name: jax.ShapeDtypeStruct(p.shape, dtype) for name, p in known.items()}
    names, _ = split_trainable(known, trainable)
    state = jax.eval_shape(lambda params: init_state(params, names, optimizer), shapes)
    return _placed(state, state_shardings(state, known, mesh))


def abstract_batch(
    config: ModelConfig, rows: int, length: int, patches: int, mesh: Mesh
) -> TrainBatch:
    """Shapes and shardings of packed rows.

    Args:
      length: tokens per row.
      patches: image patches per row; 0 is text only.
    """
    inputs, vision = packed_shapes(
        config, Packing(rows, length, patches), pixel_dtype=jnp.bfloat16, slice_reach=1024
    )
    tokens = inputs.tokens
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = TrainBatch(vision, None, inputs, None, targets=tokens, weights=weights)
    return _placed(batch, batch_shardings(batch, mesh))


def _placed(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
