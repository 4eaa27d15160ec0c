"""Rotary embeddings in float32: M-RoPE for the decoder, 2-D for the vision tower."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def decoder_angles(
    positions: Array, head_dim: int, theta: float, sections: tuple[int, int, int] | None
) -> Array:
    """Angles of the decoder's rotary embedding.

    A float32 product of position and frequency is off by 0.03 rad at a million tokens. So angles
    are counted in 2^-32 turns by int32, whose overflow drops whole turns: the frequency is an
    integer number of these and a rest of at most a half. At any position the result is within 1e-6
    of the exact angle less whole turns.

    Args:
      positions: [3, batch, length] int32, temporal, height, width (equal for text).
      sections: number of the head_dim / 2 frequencies for each axis. None is plain RoPE, which uses
        the temporal axis only.

    Returns:
      [batch, length, head_dim / 2] float32, from -pi to pi.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    axis = (
        np.zeros(head_dim // 2, np.int32) if sections is None else np.repeat(np.arange(3), sections)
    )
    turns = frequency / (2 * np.pi)
    units = (turns - np.round(turns)) * 2**32
    whole = np.round(units).astype(np.int64).astype(np.int32)  # half a turn wraps too
    rest = (units - np.round(units)).astype(np.float32)
    per_frequency = jnp.moveaxis(positions[axis], 0, -1)  # [batch, length, head_dim / 2]
    small = jnp.round(per_frequency.astype(jnp.float32) * rest).astype(jnp.int32)
    turned = per_frequency.astype(jnp.int32) * whole + small
    return turned.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


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
