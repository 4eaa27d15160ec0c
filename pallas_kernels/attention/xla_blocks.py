"""The static plan of blockwise attention: which blocks of queries meet which blocks of keys."""

import dataclasses

import numpy as np

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tuning import XLA as XLAAttention


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of attention. In a step, each of `count` adjacent query blocks of `q_block` rows
    meets `reach` key rows. Those of the step's query block j begin j * q_block rows after the
    step's first key row.

    q_total: rows of the padded queries. k_front: key pads in front. k_total: rows of the padded
        keys.
    starts: [steps, 2], the first query row and the first key row of each step, in padded rows.
    """

    q_block: int
    reach: int
    count: int
    q_total: int
    k_front: int
    k_total: int
    starts: np.ndarray

    @property
    def q_rows(self) -> int:
        return self.count * self.q_block

    @property
    def k_rows(self) -> int:
        return self.q_rows - self.q_block + self.reach


def plan(q_length: int, k_length: int, mask: Mask, packed: bool) -> Plan:
    """The steps that cover every pair of a query row and a key row that can meet. packed: there are
    segments."""
    if (
        mask.aligned
        and mask.window is not None
        and mask.window <= XLAAttention.band
        and not mask.sinks
        and q_length > XLAAttention.band
    ):
        return _band(q_length, mask)
    return _pairs(q_length, k_length, mask, packed)


def _band(length: int, mask: Mask) -> Plan:
    """A narrow window: each small query block meets the few key blocks around it, many query blocks
    in one step."""
    block = 64 if mask.window <= 64 else 128
    # Key blocks before the query's own that are in the window.
    back = -(-(mask.window - 1) // block)
    wide = back + 1 + (0 if mask.causal else back)
    blocks = -(-length // block)
    steps = -(-blocks * block * wide * block // XLAAttention.band_area)
    count = -(-blocks // steps)
    rows = np.arange(steps) * count * block
    return Plan(
        q_block=block,
        reach=wide * block,
        count=count,
        q_total=steps * count * block,
        k_front=back * block,
        k_total=(steps * count - 1 + wide) * block,
        starts=np.stack([rows, rows], axis=1),
    )


def _pairs(q_length: int, k_length: int, mask: Mask, packed: bool) -> Plan:
    """Pairs of a query block and a key block, without those that alignment rules out."""
    side = XLAAttention.side
    if mask.aligned and mask.window is not None:
        # Larger blocks would mostly hold keys outside the window.
        side = min(XLAAttention.side, max(256, mask.window // 2))
    q_block, q_count = _share(q_length, side)
    k_block, k_count = _share(k_length, side if mask.aligned else XLAAttention.area // q_block)
    q_start, k_start = np.arange(q_count) * q_block, np.arange(k_count) * k_block
    starts = np.stack(np.meshgrid(q_start, k_start, indexing="ij"), axis=-1).reshape(-1, 2)
    if mask.aligned:
        first_q, first_k = starts.T
        last_q, last_k = first_q + q_block - 1, first_k + k_block - 1
        meet = np.ones(len(starts), bool)
        if mask.window is not None:
            meet &= first_q - last_k < mask.window
            if not mask.causal:
                meet &= first_k - last_q < mask.window
            # A single sequence has its sinks in its first rows, packed ones have them anywhere.
            meet |= (first_k < mask.sinks) | (packed and mask.sinks > 0)
        if mask.causal:
            meet &= first_k <= last_q
        starts = starts[meet]
    return Plan(q_block, k_block, 1, q_count * q_block, 0, k_count * k_block, starts)


def _share(length: int, most: int) -> tuple[int, int]:
    """Block length and number of blocks: even shares, multiples of 64 when there are several."""
    count = max(1, -(-length // most))
    block = -(-length // count)
    return (block, 1) if count == 1 else (-(-block // 64) * 64, count)
