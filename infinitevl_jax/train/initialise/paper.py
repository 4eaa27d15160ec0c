"""The authors' initialisation: nothing is copied into Gated DeltaNet mixers."""

import numpy as np

from infinitevl_jax.config.model import LINEAR
from infinitevl_jax.config.student import PaperConfig
from infinitevl_jax.nn.params import Params
from infinitevl_jax.train.initialise.initialiser import Setting, register_initialiser

STEP = 0.001  # softplus(dt_bias): the decay of a token is exp(-0.001)


def inverse_softplus(x: float | np.ndarray) -> np.ndarray:
    """y with log(1 + exp(y)) = x, for x > 0."""
    return np.log(np.expm1(x))


def paper(setting: Setting, options: PaperConfig) -> Params:
    """Projections and convolutions as a new model has them, a slow decay, beta 1/2."""
    text = setting.student.text
    layers = [i for i, kind in enumerate(text.layer_types) if kind == LINEAR]
    heads, width = text.num_linear_heads, text.hidden_size
    values = {
        "A_log": np.zeros(heads),
        "dt_bias": np.full(heads, float(inverse_softplus(STEP))),
        "a_proj.kernel": np.zeros((width, heads)),
        "b_proj.kernel": np.zeros((width, heads)),
    }
    out: Params = {}
    for name, value in values.items():
        out |= setting.replace(name, dict.fromkeys(layers, value))
    return out


register_initialiser("paper", paper, PaperConfig)
