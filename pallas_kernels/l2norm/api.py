"""The contract of the per-head L2 normalisation."""

from jax import Array


def l2norm(x: Array, heads: int, eps: float, *, implementation: str | None = None) -> Array:
    """x / sqrt(sum of x^2 over the head + eps).

    x: [..., heads * dim]. Returns the same shape in float32 (float64 for float64). implementation:
    a name, or several in order; None: the first that can run.
    """
    from pallas_kernels.l2norm.implementations import L2NORM

    return L2NORM(x, heads, eps, implementation=implementation)


def arguments(x, heads, eps) -> dict:
    """The arguments of `l2norm` by name."""
    return {"x": x, "heads": heads, "eps": eps}
