"""Rotary embeddings in float32: M-RoPE for the decoder, 2-D for the vision tower."""

import jax.numpy as jnp
import numpy as np
from jax import Array

_STEP = 2048  # positions are split into multiples of this and a remainder


def decoder_angles(
    positions: Array, head_dim: int, theta: float, sections: tuple[int, int, int] | None
) -> Array:
    """Angles of the decoder's rotary embedding.

    A position p is split into 2048 h + l. The angle of 2048 steps is reduced modulo 2 pi in
    float64, because a float32 product is off by 0.03 rad at a million tokens.

    Args:
      positions: [3, batch, length] int32, temporal, height, width (equal for text).
      sections: number of the head_dim / 2 frequencies for each axis. None is plain RoPE, which uses
        the temporal axis only.

    Returns:
      [batch, length, head_dim / 2] float32.
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
    """Angles of the vision tower's 2-D rotary embedding.

    Args:
      row_column: [..., 2] patch coordinates.

    Returns:
      [..., head_dim / 2] float32, rows first.
    """
    frequency = (
        theta ** (-np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
    ).astype(np.float32)
    angles = row_column[..., None].astype(jnp.float32) * frequency  # [..., 2, head_dim / 4]
    return angles.reshape(*row_column.shape[:-1], head_dim // 2)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Apply rotary embedding in rotate-half form.

    Args:
      x: [batch, length, heads, head_dim].
      cos, sin: [batch, length, rotary_dim / 2]. Channels beyond rotary_dim are unchanged.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = (x, None) if rotary_dim == x.shape[-1] else jnp.split(x, [rotary_dim], axis=-1)
    first, second = jnp.split(turned.astype(cos.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    turned = turned.astype(x.dtype)
    return turned if rest is None else jnp.concatenate([turned, rest], -1)
