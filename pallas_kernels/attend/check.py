"""What arguments of `attend` must agree on, whichever implementation gets them."""

import jax

from pallas_kernels.attend.mask import Mask


def check(q: jax.Array, k: jax.Array, v: jax.Array, q_segment: jax.Array | None, k_segment: jax.Array | None, mask: Mask) -> None:
    """Raises ValueError for shapes that do not fit together, segments on one side only, or an aligned mask over Tq != Tk."""
    if not k.shape[2] or q.shape[2] % k.shape[2] or k.shape[2] != v.shape[2]:
        heads = f"{q.shape[2]} query heads, {k.shape[2]} key heads and {v.shape[2]} value heads"
        raise ValueError(f"attend: {heads}\n  -> key and value heads must be equal and divide the query heads")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attend: queries {q.shape[3]} wide, keys {k.shape[3]}\n  -> their product is the score: give equal widths")
    if k.shape[1] != v.shape[1] or not q.shape[0] == k.shape[0] == v.shape[0]:
        shapes = f"q {list(q.shape[:2])}, k {list(k.shape[:2])} and v {list(v.shape[:2])}"
        raise ValueError(f"attend: batch and length are {shapes}\n  -> one batch size, and a value for each key")
    if (q_segment is None) != (k_segment is None):
        raise ValueError("attend: segments given on one side only\n  -> give q_segment and k_segment, or neither")
    if mask.aligned and q.shape[1] != k.shape[1]:
        raise ValueError(f"attend: aligned mask, but {q.shape[1]} queries and {k.shape[1]} keys\n  -> aligned=False")
