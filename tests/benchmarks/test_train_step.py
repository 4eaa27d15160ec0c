"""The training benchmark at a tiny size, and the FLOPs it counts against sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.step_timing import random_batch
from benchmarks.train_flops import causal_pairs, stage_flops, step_flops
from benchmarks.train_step import TRAIN, measure, measure_stage, of_stage, starter
from infinitevl_jax.config.model import (
    FULL,
    LINEAR,
    SLIDING,
    ModelConfig,
    TextConfig,
    VisionConfig,
    hybrid_pattern,
    infinitevl_4b,
)
from infinitevl_jax.config.objective import DistillConfig, LayerwiseConfig
from infinitevl_jax.nn.mixers import register_mixer
from infinitevl_jax.nn.mixers.gated_delta_net import GatedDeltaNet
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.optimizer import split_trainable

TINY = ModelConfig(
    TextConfig(
        hybrid_pattern(4, period=2),
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=24,
        mrope_section=(2, 3, 3),
        num_linear_heads=2,
        linear_head_dim=16,
    ),
    VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        patch_size=2,
        window_size=8,
        out_hidden_size=32,
        fullatt_block_indexes=(1,),
    ),
    image_token_id=91,
    video_token_id=92,
    vision_start_token_id=93,
    vision_end_token_id=94,
    pad_token_id=0,
    eos_token_ids=(98,),
)
GRID = (1, 4, 8)


def counted(config, patterns, length, images, grid):
    names, _ = split_trainable(parameters(config, scanned=False), patterns)
    return step_flops(
        config, names, random_batch(config, np.random.default_rng(0), length, images, grid)
    )


def test_a_layer_kind_that_cannot_be_counted_is_refused():
    register_mixer("uncounted", GatedDeltaNet)
    text = replace(TINY.text, layer_types=("uncounted", *TINY.text.layer_types[1:]))
    with pytest.raises(ValueError, match="layers of the kind 'uncounted' cannot be counted"):
        counted(replace(TINY, text=text), TRAIN["mixers"], 40, 1, GRID)


def test_visible_pairs():
    for length, window in ((5, None), (5, 8), (9, 4), (1, 1)):
        seen = [
            (i, j) for i in range(length) for j in range(i + 1) if window is None or i - j < window
        ]
        assert causal_pairs(length, window) == len(seen)


def test_flops_by_hand():
    found = counted(TINY, TRAIN["mixers"], 40, 1, GRID)
    softmax_in, delta_in = 32 * (64 + 32 + 32), 32 * (32 + 32 + 64 + 64 + 2 + 2)
    softmax, delta, mlp = softmax_in + 64 * 32, delta_in + 64 * 32, 3 * 32 * 48
    n = 2 * (softmax + delta) + 4 * mlp
    assert found["forward"] == 2 * 40 * n
    assert found["activations"] == 2 * 40 * (n - softmax_in)  # below the first mixer nothing trains
    assert found["weights"] == 2 * 40 * 2 * (softmax + delta)
    assert found["attention"] == 2 * 3 * 4 * 64 * (24 * 25 / 2 + 16 * 24)
    assert found["delta_rule"] == 2 * 3 * 6 * 2 * 16 * 32 * 40
    assert found["head"] == 2 * 2 * 40 * 100 * 32
    block = 4 * 32 * 32 + 3 * 32 * 40
    tower = 2 * 32 * (24 * 32 + 2 * block) + 2 * 8 * (128 * 128 + 128 * 32)
    assert found["vision"] == tower + 4 * 32 * (
        2 * 16**2 + 32**2
    )  # two windows of 16 patches, one slice of 32


def test_flops_of_stages_by_hand():
    """The teacher's forward pass, and in I-1 the compared mixers, whose gradients end there."""
    models = {
        STUDENT: TINY,
        TEACHER: replace(TINY, text=replace(TINY.text, layer_types=(FULL,) * 4)),
    }
    batch = random_batch(TINY, np.random.default_rng(0), 40, 1, GRID)
    known = parameters(TINY, scanned=False)
    names, _ = split_trainable(known, [r"layers\.[13]\.self_attn\..*"])
    student = step_flops(TINY, names, batch)
    softmax, mlp = 32 * (64 + 32 + 32) + 64 * 32, 3 * 32 * 48
    delta = 32 * (32 + 32 + 64 + 64 + 2 + 2) + 64 * 32
    teacher = {
        "forward": 2 * 40 * 4 * (softmax + mlp),
        "attention": 4 * 4 * 64 * 40 * 41 / 2,
        "head": 2 * 40 * 100 * 32,
        "vision": student["vision"],
    }
    found = stage_flops(DistillConfig(), models, names, batch)
    assert found == {term: count + teacher.get(term, 0) for term, count in student.items()}
    found = stage_flops(LayerwiseConfig(layer_types=(LINEAR,)), models, names, batch)
    assert found == {
        "forward": teacher["forward"] + 2 * 40 * 2 * delta,
        "activations": 2 * 40 * 2 * 64 * 32,
        "weights": 2 * 40 * 2 * delta,
        "attention": teacher["attention"],
        "delta_rule": 2 * 3 * 6 * 2 * 16 * 32 * 40,
        "head": 0,
        "vision": teacher["vision"],
    }


def test_flops_of_the_published_size():
    """The usual 6 N a token where all of the decoder trains, within what the first layer and the
    tied head save."""
    found = counted(infinitevl_4b(), TRAIN["decoder"], 8192, 0, None)
    shapes = parameters(infinitevl_4b(), scanned=True)
    n = sum(np.prod(s.shape) for name, s in shapes.items() if name.startswith("layers."))
    assert 0.998 < sum(found[k] for k in ("forward", "activations", "weights")) / (6 * n * 8192) < 1
    assert found["vision"] == 0
    with pytest.raises(ValueError, match="embed_tokens.embedding trains"):
        counted(infinitevl_4b(), [".*"], 16, 0, None)


def test_a_setting_is_measured():
    """Text and softmax layers only, for the sake of the time it takes to compile."""
    config = replace(TINY, vision=None, text=replace(TINY.text, layer_types=(SLIDING,) * 2))
    line = measure(
        config,
        starter(config),
        TRAIN["mixers"],
        remat="none",
        steps=2,
        warmup=1,
        length=24,
        images=0,
    )
    assert line["loss_finite"] and line["loss"][0] != line["loss"][-1] and line["mfu"] is None
    assert 0 < line["trained"] < line["parameters"] and line["step_ms"]["steps"] == 2
    assert all(": xla" in ran for ran in line["ran"])


def test_a_stage_is_measured():
    """Stage I-2 of two layers, of which the preset trains the second."""
    text = replace(TINY.text, layer_types=(FULL, SLIDING))
    student = replace(TINY, vision=None, text=text)
    teacher = replace(student, text=replace(text, layer_types=(FULL,) * 2))
    models = {STUDENT: student, TEACHER: teacher}
    preset = of_stage("distill", "none", True, "xla", None, 24, 0)
    line = measure_stage(preset, models, steps=2, warmup=1, images=0)
    assert line["loss_finite"] and line["loss"][0] > 0 and line["step_ms"]["steps"] == 2
    mixer = 32 * (64 + 32 + 32) + 64 * 32 + 64 + 32 + 32
    assert line["trained"] == line["of_teacher"] == mixer  # it shares all else
