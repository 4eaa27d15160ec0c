"""Rotary embeddings: M-RoPE (temporal, height, width) for the decoder, 2-D for the vision tower.
Angles in f32."""

import jax.numpy as jnp
import numpy as np
from jax import Array

_STEP = 2048  # positions are split at multiples of this; smaller ones take one product


def decoder_angles(
    positions: Array, head_dim: int, theta: float, sections: tuple[int, int, int] | None
) -> Array:
    """Angles of the decoder's rotary embedding.

    Args:
      positions: [3, batch, length] int32, temporal, height, width (equal for text).
      sections: how many of the head_dim / 2 frequencies take each axis, or None for plain RoPE (the
        temporal axis alone).

    Returns:
      [batch, length, head_dim / 2] f32. A position p is split into 2048 h + l, and the turn of 2048
      steps is reduced modulo 2 pi in
      float64 beforehand: at a million, f32 would otherwise be off by 0.03 rad.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    axis = (
        np.zeros(head_dim // 2, np.int32) if sections is None else np.repeat(np.arange(3), sections)
    )
    turn = (np.remainder(_STEP * frequency + np.pi, 2 * np.pi) - np.pi).astype(
        np.float32
    )  # of _STEP positions, in [-pi, pi)
    per_frequency = jnp.moveaxis(positions[axis], 0, -1)  # [batch, length, head_dim / 2]
    high, low = per_frequency // _STEP, per_frequency % _STEP
    return low.astype(jnp.float32) * frequency.astype(np.float32) + high.astype(jnp.float32) * turn


def vision_angles(row_column: Array, head_dim: int, theta: float) -> Array:
    """Angles of the vision tower: [..., 2] patch (row, column) -> [..., head_dim / 2] f32, rows
    first."""
    frequency = (
        theta ** (-np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
    ).astype(np.float32)
    angles = row_column[..., None].astype(jnp.float32) * frequency  # [..., 2, head_dim / 4]
    return angles.reshape(*row_column.shape[:-1], head_dim // 2)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn heads by their angles, in rotate-half form.

    Args:
      x: [batch, length, heads, head_dim].
      cos, sin: [batch, length, rotary_dim / 2]; what lies beyond the first rotary_dim channels of a
        head is left as it is.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = (x, None) if rotary_dim == x.shape[-1] else jnp.split(x, [rotary_dim], axis=-1)
    first, second = jnp.split(turned.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    turned = turned.astype(x.dtype)
    return turned if rest is None else jnp.concatenate([turned, rest], -1)
