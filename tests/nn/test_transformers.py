"""Logits and hidden states equal transformers' on tiny random weights from `save_pretrained`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from infinitevl_jax import InfiniteVL
from infinitevl_jax.inputs.model_inputs import build_inputs
from pallas_kernels.testing.parity import rel_rms

IMAGE, VIDEO, START, END = 91, 92, 93, 94
GRIDS = [
    (1, 6, 10),
    (1, 2, 2),
    (1, 14, 4),
    (3, 10, 6),
]  # odd window edges, one token, tall, a video of three steps


def randomise(model, seed=0):
    """Randomise every tensor, including biases and norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn_like(p) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
                + (1 if "norm" in name or "ln_q" in name else 0)
            )
    return model.eval()


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    text = dict(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=1e6,
        tie_word_embeddings=True,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        bos_token_id=0,
        eos_token_id=98,
    )
    vision = dict(
        depth=4,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        patch_size=14,
        window_size=112,
        out_hidden_size=32,
        fullatt_block_indexes=[1, 3],
        tokens_per_second=2,
    )
    ids = dict(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    model = randomise(Qwen2_5_VLForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("vl")
    model.save_pretrained(folder)
    return model, InfiniteVL.from_pretrained(folder)


def pixels(grids, seed=0):
    return (
        np.random.default_rng(seed)
        .normal(size=(int(np.prod(grids, 1).sum()), 1176))
        .astype(np.float32)
    )


@pytest.fixture(scope="module")
def batch():
    """Two left-padded sequences: three images and a video between texts."""
    rng = np.random.default_rng(0)

    def text(n):
        return rng.integers(1, 90, n).tolist()

    def image(grid):
        return [START] + [IMAGE] * (int(np.prod(grid)) // 4) + [END]

    first = text(4) + image(GRIDS[0]) + text(3) + image(GRIDS[1]) + text(6)
    second = text(2) + image(GRIDS[2]) + [START] + [VIDEO] * 45 + [END] + text(9)
    width = len(second)
    ids = np.array([[0] * (width - len(first)) + first, second])
    mask = np.array([[0] * (width - len(first)) + [1] * len(first), [1] * width])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels(GRIDS[:3]),
        "image_grid_thw": np.array(GRIDS[:3]),
        "pixel_values_videos": pixels(GRIDS[3:]),
        "video_grid_thw": np.array(GRIDS[3:]),
        "second_per_grid_ts": np.array([1.0]),
    }


def left_padded(positions, shift, width):
    """Convert right-padded positions [3, batch, length] to transformers' left padding."""
    out = np.ones((3, len(shift), width), np.int64)
    for b, s in enumerate(shift):
        out[:, b, s:] = positions[:, b, : width - s]
    return out


def torch_logits(model, batch, positions, **extra):
    kinds = np.select([batch["input_ids"] == IMAGE, batch["input_ids"] == VIDEO], [1, 2], 0)
    inputs = {k: torch.tensor(v) for k, v in batch.items()} | {
        "mm_token_type_ids": torch.tensor(kinds)
    }
    for name in ("pixel_values", "pixel_values_videos"):
        inputs[name] = inputs[name].to(model.dtype)
    with torch.no_grad():
        return model(**inputs, position_ids=torch.tensor(positions), **extra)


def valid(x, mask):
    return np.concatenate([np.asarray(x[b])[mask[b] > 0] for b in range(len(mask))]).astype(
        np.float64
    )


def test_vision_tower(vl):
    """Odd grids, several images and a video in one call."""
    model, ours = vl
    values = pixels(GRIDS)
    with torch.no_grad():
        expected = model.model.visual(
            torch.tensor(values), grid_thw=torch.tensor(GRIDS)
        ).pooler_output.numpy()
    ids = [[IMAGE] * int(np.prod(GRIDS[:3], 1).sum() // 4) + [VIDEO] * 45]
    inputs = build_inputs(
        ours.config,
        ids,
        pixel_values=pixels(GRIDS)[: len(values) - 180],
        image_grid_thw=GRIDS[:3],
        pixel_values_videos=values[-180:],
        video_grid_thw=GRIDS[3:],
    )
    tokens = np.asarray(ours.programs.encode(ours.params, inputs.patches))[0][
        inputs.decoder.vision_index[0]
    ]
    assert rel_rms(tokens, expected) <= 1e-5


def test_full_attention_model(vl, batch):
    model, ours = vl
    inputs = build_inputs(ours.config, **batch)
    positions = left_padded(
        inputs.decoder.positions, inputs.left_padding, batch["input_ids"].shape[1]
    )
    expected = torch_logits(model, batch, positions, output_hidden_states=True)
    out = ours(**batch, mm_token_type_ids=batch["input_ids"], output_hidden_states=True)
    mask = batch["attention_mask"]
    assert rel_rms(valid(out.logits, mask), valid(expected.logits, mask)) <= 1e-5
    assert len(out.hidden_states) == len(expected.hidden_states) == 4
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert rel_rms(valid(a, mask), valid(b, mask)) <= 1e-5
    given = ours(**batch, position_ids=positions)
    assert rel_rms(valid(given.logits, mask), valid(expected.logits, mask)) <= 1e-5


def test_bf16_is_as_near_as_torchs_own(vl, batch):
    model, ours = vl
    inputs = build_inputs(ours.config, **batch)
    positions = left_padded(
        inputs.decoder.positions, inputs.left_padding, batch["input_ids"].shape[1]
    )
    mask = batch["attention_mask"]
    rounded = {name: p.astype(jnp.bfloat16) for name, p in ours.params.items()}
    half = InfiniteVL(ours.config, rounded)
    wide = InfiniteVL(ours.config, {name: p.astype(jnp.float32) for name, p in rounded.items()})
    exact = valid(wide(**batch).logits, mask)  # f32 on the rounded weights
    state = {name: p.clone() for name, p in model.state_dict().items()}
    try:
        theirs = valid(torch_logits(model.bfloat16(), batch, positions).logits.float(), mask)
    finally:
        model.float().load_state_dict(state)
    error, peer = rel_rms(valid(half(**batch).logits, mask), exact), rel_rms(theirs, exact)
    assert error <= 1.5 * peer, (error, peer)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_text_model(tmp_path, tied):
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_theta=1e5,
    )
    model = randomise(Qwen2ForCausalLM(config))
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 100, (2, 70))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    ours = InfiniteVL.from_pretrained(tmp_path)
    assert rel_rms(ours(ids).logits, expected) <= 1e-5
    cached = ours(ids[:, :50], use_cache=True, max_length=70).cache
    assert rel_rms(ours(ids[:, 50:], cache=cached).logits, expected[:, 50:]) <= 1e-5
