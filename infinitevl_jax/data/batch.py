"""What one training step sees."""

from typing import NamedTuple

import numpy as np
from jax import Array

from infinitevl_jax.inputs.model_inputs import Inputs
from infinitevl_jax.inputs.patches import Patches


class TrainBatch(NamedTuple):
    """A global batch of one shape, in one of two forms.

    Branches: `prefix` holds one row an image (with what the conversation says up to its end),
      `branches` one row a question, and
    `parents` says whose prefix each question goes on from. An image is encoded once, and no
    question sees another.
    Rows: `prefix` and `parents` are None, `branches` holds packed conversations told apart by
      segment.
    """

    patches: Patches | None  # one row an image (branches), or one row for each row (rows)
    prefix: Inputs | None  # [images, prefix_length]
    branches: Inputs  # [rows, length]
    parents: np.ndarray | Array | None  # [rows] int32
    targets: np.ndarray | Array  # [rows, length] int32, the token that follows
    weights: (
        np.ndarray | Array
    )  # [rows, length] f32: 1 where the token that follows belongs to an answer, else 0
