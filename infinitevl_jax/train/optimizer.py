"""AdamW under a cosine with warm-up."""

import re
from collections.abc import Mapping, Sequence

import jax
import optax

from infinitevl_jax.config.train import OptimizerConfig
from infinitevl_jax.errors import InfiniteVLError

# gates, norms and biases are not shrunk towards zero
NO_DECAY = re.compile(
    r"(.*\.)?(A_log|dt_bias|bias|(norm|norm1|norm2|o_norm|ln_q|input_layernorm|post_attention_layernorm)\.weight)"
)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 over the first `warmup` of them, then half a cosine down
    to `final` x peak."""
    warmup = min(round(config.warmup * steps), steps - 1) if steps > 1 else 0
    first = 0.0 if warmup else config.peak_lr
    return optax.warmup_cosine_decay_schedule(
        first, config.peak_lr, warmup, max(steps, 1), config.peak_lr * config.final
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay where it belongs, learning rate. Works on a
    dict of dotted names."""

    def decays(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: not NO_DECAY.fullmatch(name) for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def split_trainable(names: Sequence[str], patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters that train and of those that stay: a parameter trains if one pattern
    matches its whole name.

    Raises InfiniteVLError for a pattern that matches nothing.
    """
    train: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if re.fullmatch(pattern, name)]
        if not hits:
            shown = ", ".join(sorted(names)[:: max(1, len(names) // 4)][:4])
            raise InfiniteVLError(
                f"train.trainable: {pattern!r} matches no parameter", f"names look like {shown}"
            )
        train |= set(hits)
    if not train:
        raise InfiniteVLError(
            "train.trainable is empty: no parameter would train",
            'list regular expressions, or [".*"] for all',
        )
    return [n for n in names if n in train], [n for n in names if n not in train]
