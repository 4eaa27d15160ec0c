"""The arithmetic of one training step, counted from the model's definition: what MFU divides by."""

from collections.abc import Sequence

import numpy as np

from infinitevl_jax.config.model import LINEAR, SLIDING, ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.nn.towers.qwen2_5_vl import SLICE, block_kinds

# matrices that open a mixer or an MLP; o_proj and down_proj close them
MIXER_IN = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")
MLP_IN = ("gate_proj", "up_proj")


def step_flops(config: ModelConfig, trained: Sequence[str], batch: TrainBatch) -> dict[str, float]:
    """FLOPs of one step, by term; a multiplication and an addition are two.

        2 N tokens (forward) + 2 N' tokens (gradient of activations) + 2 N_trained tokens (gradient
        of weights) + attention and delta rule, forward and backward + the vision tower's forward
        pass over its own tokens

    N: the decoder's matrices and the head; not the embedding table as a look-up. N': those of them
      that have something trained below:
    nothing goes back below the lowest trained parameter, nor into tower and embeddings. What remat
    computes again, norms, convolutions, gates, activations and the optimiser are not counted; pads
    neither.

    trained: names of the parameters that train (stacked). batch: packed rows, on the host.
    Raises ValueError where the tower or the embeddings train.
    """
    stacked = parameters(config, scanned=True)
    trained = dict.fromkeys(layer for name in trained for layer in stacked[name].layers)
    if below := [name for name in trained if not name.startswith(("layers.", "norm."))]:
        raise ValueError(
            f"{below[0]} trains: what is counted here has a frozen tower and frozen embeddings"
        )
    shapes, text = parameters(config, scanned=False), config.text
    index, segment = np.asarray(batch.branches.token_index), np.asarray(batch.branches.segment_ids)
    tokens = float((index >= 0).sum())
    spans = [row[keep] for row, keep in zip(segment, index >= 0, strict=True)]
    lengths = [count for row in spans for count in np.unique(row, return_counts=True)[1]]
    flops = dict.fromkeys(
        ("forward", "activations", "weights", "attention", "delta_rule", "head", "vision"), 0.0
    )
    # whether a gradient is wanted of what flows into the part at hand: something below it trains
    reached = False

    def matrices(prefix: str, names: Sequence[str]) -> None:
        """Products of tokens with some matrices that share their input."""
        for name in names:
            full = f"{prefix}.{name}.kernel"
            if full not in shapes:  # a and b and g projections are the delta rule's alone
                continue
            size = 2.0 * tokens * shapes[full].size
            flops["forward"] += size
            flops["activations"] += size * reached  # d input = d output x matrix^T
            flops["weights"] += size * (full in trained)  # d matrix = input^T x d output

    for place, kind in enumerate(text.layer_types):
        layer = f"layers.{place}"

        def trains(part: str, but: str, layer=layer) -> bool:
            """Whether something of a part trains, but for the matrix that closes it."""
            return any(
                name.startswith(f"{layer}.{part}.") and f".{but}." not in name for name in trained
            )

        reached |= f"{layer}.input_layernorm.weight" in trained
        matrices(f"{layer}.self_attn", MIXER_IN)
        reached |= trains("self_attn", "o_proj")
        if kind == LINEAR:
            # a token reads k^T S, adds k u^T to S, reads q^T S: three products with a state [K, V]
            # a head. Its gradient takes twice that.
            once = (
                6.0 * text.linear_head_dim * text.linear_value_dim * text.num_linear_heads * tokens
            )
            flops["delta_rule"] += once * (3 if reached else 1)
        else:
            # q k^T and weights x v, 2 head_dim each, for every visible pair of every query head.
            # Backward: d v, d weights, d q, d k.
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
    # logits of every token, those without a target too, for they are computed; the gradient of the
    # hidden states; the table stays
    flops["head"] = 2.0 * text.vocab_size * text.hidden_size * tokens * (2 if reached else 1)
    if batch.patches is not None:
        flops["vision"] = _tower(config, batch)
    return flops


def causal_pairs(length: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees: itself and those before it, fewer than `window`
    back."""
    full = length if window is None else min(length, window)
    return full * (full + 1) / 2 + (length - full) * full


def _tower(config: ModelConfig, batch: TrainBatch) -> float:
    """The tower's forward pass: nothing in it trains, so nothing comes back."""
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
        # both ways, inside windows or whole slices: q k^T and weights x v
        flops += 4.0 * vision.hidden_size * sum(float(size) ** 2 for size in sizes)
    return flops
