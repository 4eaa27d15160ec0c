"""FLOPs of one training step, counted from the definition of the model, for MFU."""

from collections.abc import Mapping, Sequence

import numpy as np

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, ModelConfig
from infinitevl_jax.config.objective import LayerwiseConfig, ObjectiveConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.nn.towers.qwen2_5_vl import SLICE, block_kinds
from infinitevl_jax.train.objectives.layerwise import compared
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER

# input matrices of a mixer or an MLP; o_proj and down_proj are the output matrices
MIXER_IN = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")
MLP_IN = ("gate_proj", "up_proj")
TERMS = ("forward", "activations", "weights", "attention", "delta_rule", "head", "vision")


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
      trained: names of the parameters that train, layer by layer.
      batch: packed rows, on the host.

    Raises ValueError if the tower or the embeddings train, and for other layer kinds than attention
    and Gated DeltaNet.
    """
    if below := [name for name in trained if not name.startswith(("layers.", "norm."))]:
        raise ValueError(
            f"{below[0]} trains: only a frozen tower and frozen embeddings can be counted"
        )
    counter = _Counter(config, trained, batch)
    # whether the gradient with respect to the input of the current part is needed
    reached = False
    for place in range(config.text.num_hidden_layers):
        reached = counter.mixer(place, reached)
        reached |= counter.trains(f"layers.{place}.post_attention_layernorm")
        reached = counter.matrices(f"layers.{place}.mlp", MLP_IN, reached)
        reached = counter.matrices(f"layers.{place}.mlp", ["down_proj"], reached)
    counter.head(reached or counter.trains("norm"))
    return counter.flops


def stage_flops(
    options: ObjectiveConfig,
    configs: Mapping[str, ModelConfig],
    trained: Sequence[str],
    batch: TrainBatch,
) -> dict[str, float]:
    """FLOPs of one step of an objective, by term as of `step_flops`. A teacher's forward pass is
    among them.

    Args:
      configs: the models by name. trained: the student's parameters that train, layer by layer.
    """
    student = configs[STUDENT]
    if isinstance(options, LayerwiseConfig):
        layers = compared(student.text.layer_types, options)
        return layerwise_flops(student, configs[TEACHER], layers, trained, batch)
    flops = step_flops(student, trained, batch)
    if TEACHER in configs:
        known = step_flops(configs[TEACHER], [], batch)
        flops = {term: count + known[term] for term, count in flops.items()}
    return flops


def layerwise_flops(
    student: ModelConfig,
    teacher: ModelConfig,
    layers: Sequence[int],
    trained: Sequence[str],
    batch: TrainBatch,
) -> dict[str, float]:
    """FLOPs of one layer-wise step, by term as of `step_flops`: a forward pass of the teacher
    without its head, and the compared mixers of the student, whose gradients end at their inputs.

    Args:
      layers: that are compared. trained: the student's parameters that train, layer by layer.
    """
    flops = step_flops(teacher, [], batch) | {"head": 0.0}
    counter = _Counter(student, trained, batch)
    for place in layers:
        counter.mixer(place, False)
    return {term: count + counter.flops[term] for term, count in flops.items()} | {
        "vision": flops["vision"]
    }


class _Counter:
    """Sums of FLOPs over parts of a decoder, by term. The tower's are there from the beginning."""

    def __init__(self, config: ModelConfig, trained: Sequence[str], batch: TrainBatch):
        self.shapes, self.text = parameters(config, scanned=False), config.text
        self.trained = set(trained)
        branches = batch.branches
        index, segment = np.asarray(branches.token_index), np.asarray(branches.segment_ids)
        self.tokens = float((index >= 0).sum())
        spans = [row[keep] for row, keep in zip(segment, index >= 0, strict=True)]
        self.lengths = [n for row in spans for n in np.unique(row, return_counts=True)[1]]
        self.flops = dict.fromkeys(TERMS, 0.0)
        if batch.patches is not None:
            self.flops["vision"] = _tower(config, batch)

    def trains(self, part: str) -> bool:
        """Whether a parameter of a part trains."""
        return any(name.startswith(f"{part}.") for name in self.trained)

    def matrices(self, prefix: str, names: Sequence[str], reached: bool) -> bool:
        """Products of tokens with matrices that share their input.

        reached: whether the gradient with respect to their input is needed. Returns whether that
          with respect to their output is.
        """
        for name in names:
            full = f"{prefix}.{name}.kernel"
            if full not in self.shapes:  # only Gated DeltaNet has a_proj, b_proj and g_proj
                continue
            size = 2.0 * self.tokens * self.shapes[full].size
            self.flops["forward"] += size
            self.flops["activations"] += size * reached  # d input = d output x matrix^T
            self.flops["weights"] += size * (full in self.trained)  # d matrix = input^T x d output
        return reached or any(self.trains(f"{prefix}.{name}") for name in names)

    def mixer(self, place: int, reached: bool) -> bool:
        """The mixer of a layer with the norm before it; `reached` as of `matrices`."""
        text, kind, prefix = self.text, self.text.layer_types[place], f"layers.{place}.self_attn"
        reached |= self.trains(f"layers.{place}.input_layernorm")
        self.matrices(prefix, MIXER_IN, reached)
        inside = {name for name in self.trained if name.startswith(f"{prefix}.")}
        reached |= any(not name.startswith(f"{prefix}.o_proj.") for name in inside)
        if kind == LINEAR:
            # k^T S, S + k u^T, q^T S: three products with a state [K, V] per head and token. The
            # gradient takes twice that.
            state = text.linear_head_dim * text.linear_value_dim * text.num_linear_heads
            self.flops["delta_rule"] += 6.0 * state * self.tokens * (3 if reached else 1)
        elif kind not in (SLIDING, FULL):
            raise ValueError(f"layers of the kind {kind!r} cannot be counted")
        else:
            # q k^T and weights x v take 2 head_dim each per visible pair and query head; the
            # gradients d v, d weights, d q and d k take twice that
            window = text.sliding_window if kind == SLIDING else None
            pairs = sum(causal_pairs(int(length), window) for length in self.lengths)
            once = 4.0 * text.head_dim * text.num_attention_heads * pairs
            self.flops["attention"] += once * (3 if reached else 1)
        return self.matrices(prefix, ["o_proj"], reached)

    def head(self, reached: bool) -> None:
        """Logits of every token, with or without a target. The table does not train."""
        size = 2.0 * self.text.vocab_size * self.text.hidden_size * self.tokens
        self.flops["head"] += size * (2 if reached else 1)


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
