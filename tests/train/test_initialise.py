"""Gated DeltaNet mixers from attention: copies by head, biases, values, decay, output."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import hybrid_config, loud

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING
from infinitevl_jax.config.objective import LayerwiseConfig
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.student import (
    AttentionConfig,
    InitialiseConfig,
    MixersConfig,
    PaperConfig,
    derive,
)
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.params import functional, initialize, parameters, unstack
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.forward import hidden_states
from infinitevl_jax.train.initialise import Setting
from infinitevl_jax.train.initialise.attention import by_head, constant_row, half_lives
from infinitevl_jax.train.initialise.attention import mixer as build_mixer
from infinitevl_jax.train.initialise.statistics import Inputs, measure_inputs
from infinitevl_jax.train.models import common_layout, first_params
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.setup import Start
from infinitevl_jax.train.step import StageLoss, model_of
from pallas_kernels.testing.parity import rel_rms

RUN = RunConfig(fsdp=1)
OPTIONS = AttentionConfig(tokens=2000)
LENGTHS = ([30, 11, 19], [41, 17])


class Made:
    """A random attention model with grouped heads and biases, and packed rows of random text."""

    def __init__(self):
        config = hybrid_config(layer_types=(FULL,) * 4)
        self.source = dataclasses.replace(config, vision=None)
        params = initialize(self.source, jax.random.key(0), scanned=True)
        self.params = loud(params, 1)
        self.mesh = make_mesh(RUN)

    def batches(self):
        rng = np.random.default_rng(5)
        while True:
            packing = Packing(2, 64)
            lengths = [length for row in LENGTHS for length in row]
            assert all(packing.add(length) for length in lengths)
            longest = max(lengths)
            ids = rng.integers(1, 90, (len(lengths), longest))
            mask = np.arange(longest) < np.array(lengths)[:, None]
            inputs = build_inputs(self.source, ids, mask.astype(int), packing=packing).decoder
            weights = (np.asarray(inputs.token_index) >= 0).astype(np.float32)
            targets = np.roll(inputs.tokens, -1, 1).astype(np.int32)
            yield TrainBatch(None, None, inputs, None, targets, weights)

    def student(self, options, pattern=(LINEAR,), **mixers):
        """Configuration and parameters of a derived student, and the layout."""
        mixers = MixersConfig(layer_types=pattern, initialise=options, **mixers)
        config = derive(self.source, mixers)
        layout = common_layout(config, self.source)
        source = lambda stacked, mesh: self.stack(stacked)  # noqa: E731
        start = Start(config, None, None, None, source, self.source)
        params = first_params(start, options, layout, self.mesh, self.batches, 3)
        return config, params, layout

    def stack(self, stacked):
        """The attention model's parameters in a layout."""
        alone = unstack(self.source, dict(self.params))
        known = parameters(self.source, scanned=stacked)
        return {
            name: jnp.stack([alone[layer] for layer in p.layers]) if p.stacked else alone[name]
            for name, p in known.items()
        }

    def distance(self, config, params, layout):
        """The layer-wise loss on fresh data, and its relative error."""
        models = {
            STUDENT: model_of(config, RUN, stacked=layout),
            TEACHER: model_of(self.source, RUN, stacked=layout),
        }
        loss = StageLoss(LayerwiseConfig(), models)
        batches = self.batches()
        batch = [next(batches) for _ in range(40)][-1]
        found = jax.jit(loss)(params, {}, batch, {TEACHER: self.stack(layout)})
        return float(found.value), float(found.logged["relative_error"].value)


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.fixture(scope="module")
def students(made):
    return {options.name: made.student(options) for options in (PaperConfig(), OPTIONS)}


def mixer(config, params, layout, layer=1):
    start = f"layers.{layer}.self_attn."
    alone = unstack(config, dict(params), layout)
    return {k.removeprefix(start): np.asarray(v) for k, v in alone.items() if k.startswith(start)}


def source_mixer(made, layer=1):
    return mixer(made.source, made.params, True, layer)


def test_far_below_the_papers_start(made, students):
    paper, ours = (made.distance(*students[name]) for name in ("paper", "attention"))
    print(f"layer-wise loss and relative error: paper {paper}, attention {ours}")
    assert ours[0] < 0.6 * paper[0] and ours[1] < 0.4 * paper[1]


def test_heads_are_expanded_one_by_one(made, students):
    """Query head j reads key/value head j // 2."""
    theirs, ours = source_mixer(made), mixer(*students["attention"])
    q, k, v = (theirs[f"{n}_proj.kernel"].reshape(32, -1, 16) for n in "qkv")
    bias = theirs["k_proj.bias"].reshape(-1, 16)
    one = (ours["g_proj.kernel"].mean(1)) / 1.5
    mine = {n: ours[f"{n}_proj.kernel"].reshape(32, 4, -1) for n in "qkv"}
    assert k.shape[1] == v.shape[1] == 2 and q.shape[1] == 4
    for head in range(4):
        folded = k[:, head // 2] + np.outer(one, bias[head // 2])
        np.testing.assert_allclose(mine["k"][:, head], folded, atol=2e-2)
        np.testing.assert_array_equal(mine["v"][:, head, :16], -mine["v"][:, head, 16:])
    np.testing.assert_array_equal(mine["v"][:, 0], mine["v"][:, 1])
    np.testing.assert_array_equal(mine["v"][:, 2], mine["v"][:, 3])
    assert np.abs(mine["v"][:, 1] - mine["v"][:, 2]).max() > 0.1
    kernel = np.arange(12.0).reshape(1, 12)
    assert by_head(kernel, 3, 8)[0, :, 0].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]


def test_values_pass_the_silu_exactly(made, students):
    theirs, ours = source_mixer(made), mixer(*students["attention"])
    x = np.random.default_rng(0).normal(size=(7, 32))
    values = jax.nn.silu(x @ ours["v_proj.kernel"]).reshape(7, 4, 2, 16)
    one = ours["g_proj.kernel"].mean(1) / 1.5
    wanted = x @ theirs["v_proj.kernel"] + np.outer(x @ one, theirs["v_proj.bias"])
    wanted = by_head(wanted, 16, 4)
    np.testing.assert_allclose(values[:, :, 0] - values[:, :, 1], wanted, atol=5e-2)
    exact = (x @ ours["v_proj.kernel"]).reshape(7, 4, 2, 16)[:, :, 0]
    np.testing.assert_allclose(values[:, :, 0] - values[:, :, 1], exact, atol=1e-5)


def test_a_bias_becomes_part_of_the_projection(made):
    """w . x is near 1 over the inputs, so (W + w b) x is near W x + b."""
    layout = common_layout(made.source)
    batch = next(made.batches())
    setting = Setting(made.source, made.params, made.source, {}, layout, made.mesh, made.batches, 0)
    (found,) = measure_inputs(setting, made.batches(), 4000, [1])
    one = constant_row(found)
    vlm = functional(made.source, scanned=True)(made.params)
    _, _, inputs = vlm.decode(vlm.embed(batch.branches, None), batch.branches, collect=True)
    layer = vlm.layers.layers()[1]
    real = np.asarray(batch.branches.token_index >= 0)
    x = np.asarray(layer.input_layernorm(inputs[1]))[real]
    assert found.gram.shape == (32, 32)
    assert np.mean((x @ one - 1) ** 2) < 0.5  # 1 without it
    np.testing.assert_allclose(np.mean(x @ one), 1, atol=0.5)


def test_half_lives_are_mean_distances(made):
    """Against plain attention, segment by segment, token 0 left out."""
    layout = common_layout(made.source)
    setting = Setting(made.source, made.params, made.source, {}, layout, made.mesh, made.batches, 0)
    tokens = sum(map(sum, LENGTHS))
    (found,) = measure_inputs(setting, made.batches(), tokens, [2])
    batch = next(made.batches())
    vlm = functional(made.source, scanned=True)(made.params)
    inputs = batch.branches
    _, _, hidden = vlm.decode(vlm.embed(inputs, None), inputs, collect=True)
    layer = vlm.layers.layers()[2]
    info = vlm.token_info(inputs, vlm.positions(inputs))
    q, k, _, _ = layer.self_attn.project(layer.input_layernorm(hidden[2]), info)
    index, segment = (np.asarray(x) for x in (inputs.token_index, inputs.segment_ids))
    k = np.repeat(np.asarray(k), 2, axis=2)
    scores = np.einsum("bthd,bshd->bhts", np.asarray(q), k) / 4
    back = index[:, :, None] - index[:, None, :]
    seen = (segment[:, :, None] == segment[:, None, :]) & (back >= 0)
    seen &= (index >= 0)[:, :, None] & (index >= 0)[:, None, :]
    p = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30) * (index[:, None, None, :] > 0)
    mass, distance = p.sum((0, 2, 3)), (p * back[:, None]).sum((0, 2, 3))
    np.testing.assert_allclose(found.mass, mass, rtol=1e-4)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-4)
    lives = half_lives(found, AttentionConfig(shortest=0.001))
    np.testing.assert_allclose(lives, distance / mass, rtol=1e-4)
    assert half_lives(found, AttentionConfig(shortest=200, longest=300)).tolist() == [200.0] * 4


def test_decay_is_that_of_the_half_life(students):
    ours = mixer(*students["attention"])
    decay = -np.exp(ours["A_log"]) * np.log1p(np.exp(ours["dt_bias"]))
    lives = np.log(0.5) / decay
    assert ((lives >= 2 - 1e-4) & (lives <= 512)).all() and len(set(lives.round(3))) > 1
    for name in ("a_proj.kernel", "b_proj.kernel"):
        assert not ours[name].any()
    for name in "qkv":
        taps = ours[f"{name}_conv1d.weight"]
        assert not taps[:-1].any() and (taps[-1] == 1).all()


def test_the_paper_copies_nothing_into_new_mixers(made, students):
    config, params, layout = students["paper"]
    ours, theirs = mixer(config, params, layout), source_mixer(made)
    np.testing.assert_allclose(ours["dt_bias"], -6.90726, atol=1e-4)
    assert not ours["A_log"].any() and not ours["a_proj.kernel"].any()
    assert np.abs(ours["q_proj.kernel"]).max() <= 32**-0.5
    assert np.corrcoef(ours["q_proj.kernel"].ravel(), theirs["q_proj.kernel"].ravel())[0, 1] < 0.1


@pytest.mark.parametrize("options", [PaperConfig(), OPTIONS], ids=["paper", "attention"])
def test_all_else_is_copied(made, options):
    """Softmax layers too: with a window over everything they compute what they did."""
    config, params, layout = made.student(options, (SLIDING, LINEAR), sliding_window=64)
    ours = unstack(config, dict(params), layout)
    theirs = unstack(made.source, dict(made.params))
    for name, value in ours.items():
        new = any(name.startswith(f"layers.{i}.self_attn.") for i in (1, 3))
        if not new:
            np.testing.assert_array_equal(value, theirs[name])
    config, params, layout = made.student(options, (SLIDING,), sliding_window=64)
    batch = next(made.batches())
    found, wanted = (
        hidden_states(partial(model_of(c, RUN, stacked=x), p), batch)[1]
        for c, p, x in ((config, params, layout), (made.source, made.params, True))
    )
    real = np.asarray(batch.branches.token_index >= 0)
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=2e-5)


def test_wider_keys_are_exact(made):
    """Keys filled with zeros, values as wide as before: the same student."""
    wide = {"linear_head_dim": 32, "expand_v": 1.0}
    # o is read with 1 / sqrt(32) instead of 1 / sqrt(16): half the eps of its norm is the same
    eps = MixersConfig(layer_types=(LINEAR,)).norm_eps
    narrow, wider = made.student(OPTIONS), made.student(OPTIONS, norm_eps=eps / 2, **wide)
    assert wider[0].text.linear_head_dim == 2 * narrow[0].text.linear_head_dim
    assert wider[0].text.linear_value_dim == narrow[0].text.linear_value_dim
    a, b = mixer(*narrow), mixer(*wider)
    keys = b["k_proj.kernel"].reshape(32, 4, 32)
    np.testing.assert_array_equal(keys[..., :16].reshape(32, -1), a["k_proj.kernel"])
    assert not keys[..., 16:].any()
    batch = next(made.batches())
    found, wanted = (
        hidden_states(partial(model_of(c, RUN, stacked=x), p), batch)[1]
        for c, p, x in (narrow, wider)
    )
    real = np.asarray(batch.branches.token_index >= 0)
    assert rel_rms(np.asarray(found)[real], np.asarray(wanted)[real]) <= 1e-4


def test_norms_of_queries_and_keys_are_folded(made):
    """The direction of each head, all that counts in the new mixer, is the attention's."""
    text = dataclasses.replace(made.source.text, query_key_norm=True)
    source = dataclasses.replace(made.source, text=text)
    student = derive(source, MixersConfig(layer_types=(LINEAR,)))
    rng = np.random.default_rng(0)
    weights = {
        f"{n}_proj.kernel": rng.normal(size=(32, w)) for n, w in (("q", 64), ("k", 32), ("v", 32))
    }
    weights |= {f"{n}_norm.weight": rng.normal(size=16) for n in "qk"}
    setting = Setting(source, {}, student, {}, True, made.mesh, made.batches, 0)
    found = Inputs(np.eye(32), np.zeros(32), np.ones(4), np.ones(4))
    ours = build_mixer(weights, found, setting, OPTIONS, rng)
    x = rng.normal(size=(5, 32))
    for name, heads in (("q", 4), ("k", 2)):
        theirs = (x @ weights[f"{name}_proj.kernel"]).reshape(5, heads, 16)
        theirs = np.repeat(theirs * weights[f"{name}_norm.weight"], 4 // heads, axis=1)
        mine = (x @ ours[f"{name}_proj.kernel"]).reshape(5, 4, 16)
        for directions in (mine, theirs):
            directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_unknown_ways_and_unfit_models_are_refused(made):
    with pytest.raises(InfiniteVLError, match="name is 'no_such'"):
        MixersConfig(layer_types=(LINEAR,), initialise=InitialiseConfig("no_such"))
    with pytest.raises(InfiniteVLError, match="has linear_attention layers"):
        derive(hybrid_config(), MixersConfig(layer_types=(LINEAR,)))
    gated = dataclasses.replace(made.source.text, attention_output_gate=True)
    other = Made()
    other.source = dataclasses.replace(made.source, text=gated)
    with pytest.raises(InfiniteVLError, match="output gate"):
        other.params = initialize(other.source, jax.random.key(0), scanned=True)
        other.student(OPTIONS)
