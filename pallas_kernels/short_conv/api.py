"""The contract of the short convolution. A call with one token is its one-token step."""

from jax import Array


def short_conv(
    x: Array,
    weight: Array,
    conv_state: Array | None = None,
    token_index: Array | None = None,
    segment_ids: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """`silu(sum_d weight[3 - d] * x[t - d])` for every channel, d = 0..3, with sums in float32.

    Args:
        x: [batch, length, channels], or `pallas_kernels.columns.Columns` of an array with more.
        weight: [4, channels]; row 3 multiplies the current token.
        conv_state: [batch, 3, channels], the three inputs before this call, of the sequence that
            the first valid token continues. None: zeros.
        token_index: [batch, length] int, -1 marks a pad. None: no pads. Pads may be at the end of a
            row or between two sequences, not inside a sequence or before the first.
        segment_ids: [batch, length] int. No tap reads across a change of segment. None: one
            segment.
        implementation: a name, or several in order ("mosaic_tpu,xla"). None: the first that can
            run.

    Returns:
        out [batch, length, channels] in x's dtype, zero at pads, and the new conv_state [batch, 3,
        channels] in x's dtype: the last three inputs of the last valid token's sequence, zeros
        where it has had fewer. A row without valid tokens returns its conv_state bit for bit. The
        contents of pads (NaN included) reach neither results nor gradients.

    Differentiable in x, weight and conv_state. The backward pass saves only the inputs. Raises
    Refusal where no allowed implementation takes the call.
    """
    # Imports the kernels' compilers.
    from pallas_kernels.short_conv.implementations import SHORT_CONV

    return SHORT_CONV(
        x, weight, conv_state, token_index, segment_ids, implementation=implementation
    )


def arguments(x, weight, conv_state=None, token_index=None, segment_ids=None) -> dict:
    """The arguments of `short_conv` by name."""
    return {
        "x": x,
        "weight": weight,
        "conv_state": conv_state,
        "token_index": token_index,
        "segment_ids": segment_ids,
    }
