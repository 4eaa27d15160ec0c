"""A training batch: what one step reads."""

from typing import NamedTuple

import numpy as np
from jax import Array

from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.inputs.patches import Patches


class TrainBatch(NamedTuple):
    """A global batch of one shape, in one of two forms.

    Branches: `prefix` has one row for each image, with the conversation up to the image's end;
      `branches` has one row for each question; `parents` gives the prefix that each question
      follows. An image is encoded once, and no question sees another.
    Rows: `prefix` and `parents` are None, `branches` has packed conversations, told apart by
      segment_ids.
    """

    patches: Patches | None  # one row for each row of `prefix`, or of `branches` where that is None
    prefix: DecoderInputs | None  # [images, prefix_length]
    branches: DecoderInputs  # [rows, length]
    parents: np.ndarray | Array | None  # [rows] int32
    targets: np.ndarray | Array  # [rows, length] int32, the token that follows
    # [rows, length] f32: 1 where the token that follows belongs to an answer, else 0
    weights: np.ndarray | Array
