"""Columns of an array that holds several side by side, such as a joint projection.

A kernel reads them where they are. XLA would copy them out first, or pass a pointer that is not
aligned as kernels want it.
"""

from dataclasses import dataclass, field

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Columns:
    """`array[..., start : start + width]`, which is not made until it is asked for."""

    array: Array
    start: int = field(metadata={"static": True})
    width: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.array.shape[:-1], self.width

    @property
    def dtype(self):
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def aligned(self, numbers: int) -> bool:
        """Whether the columns of every row begin at a multiple of so many numbers."""
        return self.array.shape[-1] % numbers == 0 and self.start % numbers == 0

    @property
    def value(self) -> Array:
        return self.array[..., self.start : self.start + self.width]


def values(tree):
    """The tree with an array for each `Columns`."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Columns) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Columns),
    )
