"""Gates as the TPU kernels of the gated delta rule take them: five numbers a token. The decays
between tokens are computed from them in the kernels.

The start of a sequence inside a row is a gate too: its first token has the log decay RESET, whose
exp is exactly 0. The decay across the boundary is then exactly 0, between tokens and from the state
before, so the kernels need no masks.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.chunk_layout import split_chunks, without_pads
from pallas_kernels.gated_delta_rule.xla_decays import FLOOR, running_sums
from pallas_kernels.segments import segment_numbers

RESET = -256.0  # exp(-256 + 127 gates) is 0 in float32, and sums of 128 of them are exact
ROWS = 8  # float32 rows of a tile; three are spare
f32 = jnp.float32


def gate_rows(
    g: jax.Array,
    beta: jax.Array,
    token_index: jax.Array | None,
    segment_ids: jax.Array | None,
    size: int,
) -> jax.Array:
    """g, beta [batch, length, heads] float32 -> [chunks, batch, heads, ROWS, size]. The rows are:
    the running sum of the gates in the chunk in two parts (coarse, fine), beta, the decay since the
    state before the chunk, the decay until the chunk's end."""
    valid = None if token_index is None else token_index >= 0
    g, beta = (without_pads(x, valid) for x in (jnp.maximum(g, FLOOR), beta))
    if segment_ids is not None:
        number = segment_numbers(token_index, segment_ids)
        g = jnp.where(jnp.diff(number, axis=1, prepend=0)[..., None] > 0, RESET, g)
    g, beta = (split_chunks(x, size) for x in (g, beta))  # [N, B, H, C]
    coarse, fine = running_sums(g)
    until = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    rows = jnp.stack([coarse, fine, beta, jnp.exp(coarse + fine), until], axis=-2)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, ROWS - rows.shape[-2]), (0, 0)])


class Gates:
    """One head's rows [ROWS, C] inside a kernel, as rows [1, C] and as columns [C, 1].

    exact: keep the two parts of the running sums apart. Added up they lose 2^-10 in the decays
    after sums of -16000 and nothing relevant after mild ones, which is below the rounding of
    bfloat16 operands.
    """

    def __init__(self, rows, exact: bool):
        if not exact:
            rows = jnp.concatenate([rows[0:1] + rows[1:2], rows[1:]])
        columns = rows.T
        self._sums = [(columns[:, i : i + 1], rows[i : i + 1]) for i in range(2 if exact else 1)]
        self.beta, self.since, self.until = (columns[:, i : i + 1] for i in (2, 3, 4))
        self.whole = rows[3:4, -1:]  # decay over the whole chunk [1, 1]
        self.size = rows.shape[1]

    def between(self):
        """[C, C]: at [i, j] the decay from token j to token i >= j, 0 above the diagonal."""
        exponent = sum(column - row for column, row in self._sums)
        row, column = (
            lax.broadcasted_iota(jnp.int32, (self.size, self.size), axis) for axis in (0, 1)
        )
        # Selected, not multiplied: values above the diagonal may be inf.
        return jnp.where(row >= column, jnp.exp(exponent), 0.0)
