"""AdamW with warm-up and cosine decay."""

import re
from collections.abc import Mapping, Sequence

import jax
import optax

from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import Parameter


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then cosine decay to `final` x peak."""
    warmup = min(round(config.warmup * steps), steps - 1) if steps > 1 else 0
    first = 0.0 if warmup else config.peak_lr
    return optax.warmup_cosine_decay_schedule(
        first, config.peak_lr, warmup, max(steps, 1), config.peak_lr * config.final
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, parameters: Mapping[str, Parameter]
) -> optax.GradientTransformation:
    """Global-norm clipping, Adam, decoupled weight decay and learning rate, for a dict by name.

    Args:
      parameters: the model's; their facts say which ones decay.
    """

    def decays(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: parameters[name].facts.decay for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def split_trainable(
    parameters: Mapping[str, Parameter], patterns: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names of the trained and of the frozen parameters.

    Args:
      parameters: the model's, in either layout.
      patterns: regular expressions. A parameter trains if one matches its whole layer-by-layer
        name, such as "layers.3.mlp.up_proj.kernel".

    Raises:
      InfiniteVLError: a pattern matches nothing, or only some layers of a stack.
    """
    names = [layer for parameter in parameters.values() for layer in parameter.layers]
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            shown = ", ".join(sorted(names)[:: max(1, len(names) // 4)][:4])
            raise InfiniteVLError(
                f"train.trainable: {pattern!r} matches no parameter", f"names look like {shown}"
            )
        matched |= set(hits)
    if not matched:
        raise InfiniteVLError(
            "train.trainable is empty: no parameter would train",
            'list regular expressions, or [".*"] for all',
        )
    trained: list[str] = []
    for name, parameter in parameters.items():
        hits = [layer for layer in parameter.layers if layer in matched]
        if hits and len(hits) < len(parameter.layers):
            other = next(layer for layer in parameter.layers if layer not in matched)
            raise InfiniteVLError(
                f"train.trainable matches {hits[0]}, but not {other}, which is scanned with it",
                "match the layers of a stack together",
            )
        trained += [name] if hits else []
    return trained, [name for name in parameters if name not in trained]
