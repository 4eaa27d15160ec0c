"""AdamW with warm-up and cosine decay."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

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
    config: OptimizerConfig,
    steps: int,
    parameters: Mapping[str, Parameter],
    factors: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Global-norm clipping, Adam, decoupled weight decay and learning rate, for a dict by name.

    Args:
      parameters: the model's; their facts say which ones decay.
      factors: of the learning rate, by parameter name; 1 where it has none.
    """

    def decays(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: parameters[name].facts.decay for name in params}

    def scale(updates, params=None):
        return {name: update * factors.get(name, 1.0) for name, update in updates.items()}

    groups = [optax.stateless(scale)] if set(factors.values()) - {1.0} else []
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(config, steps)),
        *groups,
    )


def learning_rate_factors(
    parameters: Mapping[str, Parameter], trainable: Sequence[str] | Mapping[str, float]
) -> dict[str, float]:
    """Trained parameters, each with the factor of its learning rate.

    Args:
      parameters: the model's, in any layout.
      trainable: regular expressions over whole layer-by-layer names, such as
        "layers.3.mlp.up_proj.kernel"; with factors, the first that matches decides, and 0 is
        frozen.

    Raises:
      InfiniteVLError: a pattern matches nothing, or decides only some layers of a stack.
    """
    table = isinstance(trainable, Mapping)
    patterns = trainable if table else dict.fromkeys(trainable, 1.0)
    names = [layer for parameter in parameters.values() for layer in parameter.layers]
    chosen: dict[str, float] = {}
    for pattern, factor in patterns.items():
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            shown = ", ".join(sorted(names)[:: max(1, len(names) // 4)][:4])
            raise InfiniteVLError(
                f"train.trainable: {pattern!r} matches no parameter", f"names look like {shown}"
            )
        if table and not set(hits) - chosen.keys():
            raise InfiniteVLError(
                f"train.trainable: patterns before {pattern!r} match all that it matches",
                "the first that matches decides: put special patterns before general ones",
            )
        chosen = {**dict.fromkeys(hits, factor), **chosen}
    if not any(chosen.values()):
        raise InfiniteVLError(
            "train.trainable is empty: no parameter would train",
            'list regular expressions, or [".*"] for all',
        )
    out: dict[str, float] = {}
    for name, parameter in parameters.items():
        found = {layer: chosen.get(layer, 0.0) for layer in parameter.layers}
        one, factor = max(found.items(), key=lambda item: item[1])
        other, least = min(found.items(), key=lambda item: item[1])
        if factor != least:
            raise InfiniteVLError(
                f"train.trainable matches {one}, but not {other}, which is scanned with it"
                if not least
                else f"train.trainable gives {one} the factor {factor:g} and {other}, which is"
                f" scanned with it, {least:g}",
                "match the layers of a stack together",
            )
        out |= {name: factor} if factor else {}
    return out


def split_trainable(
    parameters: Mapping[str, Parameter], trainable: Sequence[str] | Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """Names of the trained and of the frozen parameters, as of `learning_rate_factors`."""
    trained = learning_rate_factors(parameters, trainable)
    return list(trained), [name for name in parameters if name not in trained]
