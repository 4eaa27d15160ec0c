"""FLOPs of one training step, counted from the definition of the model, for MFU."""

from collections.abc import Sequence

import numpy as np

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.nn.towers.qwen2_5_vl import SLICE, block_kinds

# input matrices of a mixer or an MLP; o_proj and down_proj are the output matrices
MIXER_IN = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")
MLP_IN = ("gate_proj", "up_proj")


def step_flops(config: ModelConfig, trained: Sequence[str], batch: TrainBatch) -> dict[str, float]:
    """FLOPs of one step, by term. A multiply-add counts as two.

        2 N tokens (forward) + 2 N' tokens (gradient of activations) + 2 N_trained tokens (gradient
        of weights) + attention and delta rule, forward and backward + the vision tower's forward
        pass over its own tokens

    N counts the decoder's matrices and the head, without the embedding look-up. N' counts those
    with a trained parameter below them: the backward pass ends at the lowest trained parameter and
    never enters tower or embeddings. Not counted: recomputation by remat, norms, convolutions,
    gates, activations, the optimizer, pads.

    Args:
      trained: names of the parameters that train (stacked).
      batch: packed rows, on the host.

    Raises ValueError if the tower or the embeddings train, and for other layer kinds than attention
    and Gated DeltaNet.
    """
    stacked = parameters(config, scanned=True)
    trained = dict.fromkeys(layer for name in trained for layer in stacked[name].layers)
    if below := [name for name in trained if not name.startswith(("layers.", "norm."))]:
        raise ValueError(
            f"{below[0]} trains: only a frozen tower and frozen embeddings can be counted"
        )
    shapes, text = parameters(config, scanned=False), config.text
    index, segment = np.asarray(batch.branches.token_index), np.asarray(batch.branches.segment_ids)
    tokens = float((index >= 0).sum())
    spans = [row[keep] for row, keep in zip(segment, index >= 0, strict=True)]
    lengths = [count for row in spans for count in np.unique(row, return_counts=True)[1]]
    flops = dict.fromkeys(
        ("forward", "activations", "weights", "attention", "delta_rule", "head", "vision"), 0.0
    )
    # whether the gradient with respect to the input of the current part is needed
    reached = False

    def matrices(prefix: str, names: Sequence[str]) -> None:
        """Products of tokens with matrices that share their input."""
        for name in names:
            full = f"{prefix}.{name}.kernel"
            if full not in shapes:  # only Gated DeltaNet has a_proj, b_proj and g_proj
                continue
            size = 2.0 * tokens * shapes[full].size
            flops["forward"] += size
            flops["activations"] += size * reached  # d input = d output x matrix^T
            flops["weights"] += size * (full in trained)  # d matrix = input^T x d output

    for place, kind in enumerate(text.layer_types):
        layer = f"layers.{place}"

        def trains(part: str, but: str, layer=layer) -> bool:
            """Whether a parameter of a part trains, other than its output matrix."""
            return any(
                name.startswith(f"{layer}.{part}.") and f".{but}." not in name for name in trained
            )

        reached |= f"{layer}.input_layernorm.weight" in trained
        matrices(f"{layer}.self_attn", MIXER_IN)
        reached |= trains("self_attn", "o_proj")
        if kind == LINEAR:
            # k^T S, S + k u^T, q^T S: three products with a state [K, V] per head and token. The
            # gradient takes twice that.
            once = (
                6.0 * text.linear_head_dim * text.linear_value_dim * text.num_linear_heads * tokens
            )
            flops["delta_rule"] += once * (3 if reached else 1)
        elif kind not in (SLIDING, FULL):
            raise ValueError(f"layers of the kind {kind!r} cannot be counted")
        else:
            # q k^T and weights x v take 2 head_dim each per visible pair and query head; the
            # gradients d v, d weights, d q and d k take twice that
            window = text.sliding_window if kind == SLIDING else None
            pairs = sum(causal_pairs(int(length), window) for length in lengths)
            once = 4.0 * text.head_dim * text.num_attention_heads * pairs
            flops["attention"] += once * (3 if reached else 1)
        matrices(f"{layer}.self_attn", ["o_proj"])
        reached |= (
            f"{layer}.self_attn.o_proj.kernel" in trained
            or f"{layer}.post_attention_layernorm.weight" in trained
        )
        matrices(f"{layer}.mlp", MLP_IN)
        reached |= trains("mlp", "down_proj")
        matrices(f"{layer}.mlp", ["down_proj"])
        reached |= f"{layer}.mlp.down_proj.kernel" in trained

    reached |= "norm.weight" in trained
    # logits are computed for every token, with or without a target; the table does not train
    flops["head"] = 2.0 * text.vocab_size * text.hidden_size * tokens * (2 if reached else 1)
    if batch.patches is not None:
        flops["vision"] = _tower(config, batch)
    return flops


def causal_pairs(length: int, window: int | None) -> float:
    """Visible (query, key) pairs: a query sees itself and the `window` - 1 keys before it."""
    full = length if window is None else min(length, window)
    return full * (full + 1) / 2 + (length - full) * full


def _tower(config: ModelConfig, batch: TrainBatch) -> float:
    """FLOPs of the tower's forward pass; it has no backward pass because it is frozen."""
    vision, patches = config.vision, batch.patches
    valid = np.asarray(patches.patch_index) >= 0
    count = float(valid.sum())
    shapes = parameters(config, scanned=False)

    def matrices(prefix: str) -> float:
        return sum(
            s.size
            for name, s in shapes.items()
            if name.startswith(prefix) and name.endswith(".kernel")
        )

    flops = 2.0 * count * matrices("visual.patch_embed.")
    # four patches are one token
    flops += 2.0 * count / vision.merge_unit * matrices("visual.merger.")
    for place, kind in enumerate(block_kinds(vision)):
        flops += 2.0 * count * matrices(f"visual.blocks.{place}.")
        ids = np.asarray(patches.slice_ids if kind == SLICE else patches.window_ids)
        sizes = [
            size
            for row, keep in zip(ids, valid, strict=True)
            for size in np.unique(row[keep], return_counts=True)[1]
        ]
        # not causal, within windows or slices: q k^T and weights x v
        flops += 4.0 * vision.hidden_size * sum(float(size) ** 2 for size in sizes)
    return flops
