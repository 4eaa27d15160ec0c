"""The contract of the projection."""

from jax import Array

COLUMNS = 64
"""All implementations take matrices whose columns are a multiple of this."""


def projection(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    norm: Array | None = None,
    prefetch: Array | None = None,
    eps: float = 1e-6,
    transposed: bool = False,
    *,
    implementation: str | None = None,
) -> Array:
    """`residual + gated(normed(x) @ weight + bias)` for the rows of x, one token each.

        normed(x) = x / sqrt(mean x^2 + eps) * norm
        gated([gate, up]) = silu(gate) * up

    Args:
        x: [rows, K].
        weight: [K, N], or gates and ups [K, 2, N]: then the result is gated.
        bias: [N], or [2, N] of a gated projection. None: zeros.
        residual: [rows, N]. None: zeros.
        norm: [K], the weight of the RMSNorm. None: x is not normalised.
        prefetch: the weight [K, N] or [K, 2, N] of a projection that follows. A kernel may have it
            brought nearer, into a cache. It changes no result.
        eps: of the norm.
        transposed: weight is [N, K] or [2, N, K], such as a tied embedding [vocabulary, width].
        implementation: a name, or several in order ("mosaic_gpu,xla"). None: the first that can
            run.

    Returns:
        out [rows, N] in x's dtype. Sums, gate and residual are float32 or wider, rounded once.

    `xla` is differentiable, the kernels are not. Raises Refusal where no allowed implementation
    takes the call.
    """
    # Imports the kernels' compilers.
    from pallas_kernels.projection.implementations import PROJECTION

    return PROJECTION(
        x, weight, bias, residual, norm, prefetch, eps, transposed, implementation=implementation
    )


def arguments(
    x, weight, bias=None, residual=None, norm=None, prefetch=None, eps=1e-6, transposed=False
) -> dict:
    """The arguments of `projection` by name; raises ValueError where shapes do not fit."""
    given = {"weight": weight, "bias": bias, "residual": residual, "norm": norm}
    given["prefetch"] = prefetch
    if x.ndim != 2 or weight.ndim not in (2, 3):
        raise ValueError(
            f"projection: x is {list(x.shape)} and weight {list(weight.shape)}\n  -> give x [rows,"
            " K] and weight [K, N] or [K, 2, N]; transposed, [N, K] or [2, N, K]"
        )
    if prefetch is not None and prefetch.ndim not in (2, 3):
        raise ValueError(
            f"projection: prefetch is {list(prefetch.shape)}\n  -> give the weight [K, N] or [K, 2,"
            " N] of a projection that follows"
        )
    inputs, outputs = sizes(weight, transposed)
    pair = (2,) * (weight.ndim - 2)
    wanted = {
        "weight": (*pair, outputs, x.shape[1]) if transposed else (x.shape[1], *pair, outputs),
        "bias": (*pair, outputs),
        "residual": (x.shape[0], outputs),
        "norm": (inputs,),
    }
    for name, array in given.items():
        if array is not None and array.shape != wanted.get(name, array.shape):
            raise ValueError(
                f"projection: {name} is {list(array.shape)}\n  -> give it {list(wanted[name])}: x"
                f" is {list(x.shape)}, weight {list(weight.shape)}"
            )
    return {"x": x, **given, "eps": eps, "transposed": transposed}


def sizes(weight: Array, transposed: bool) -> tuple[int, int]:
    """K and N of a weight."""
    ends = weight.shape[-1], weight.shape[-2]
    return ends if transposed else (weight.shape[0], weight.shape[-1])
