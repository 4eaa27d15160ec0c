"""A teacher's parameters: digest, precision, placement, and what it shares with the student."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_folder import full_attention_config, tiny_model, write_folder

from infinitevl_jax.checkpoints import read_config
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.student import MixersConfig, TeacherConfig, derive
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.models import Teacher, common_layout, digest, hold_teacher
from infinitevl_jax.train.objectives import register_objective

ALONE = RunConfig(fsdp=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(full_attention_config())
    return write_folder(tmp_path_factory.mktemp("teacher") / "model", model)


@pytest.fixture
def teacher(folder):
    return lambda **options: Teacher(
        read_config(folder), folder, TeacherConfig(str(folder), **options)
    )


def fingerprint(teacher, layout, run=ALONE):
    return digest(teacher.load(layout, make_mesh(run)), teacher.parameters(layout))


def test_the_digest_depends_on_values_alone(teacher):
    one = fingerprint(teacher(), True)
    assert one == fingerprint(teacher(), ("a", "b"))
    assert one == fingerprint(teacher(), True, RunConfig(fsdp=4, tensor=2))
    assert one == fingerprint(teacher(placement="replicated"), True, RunConfig(fsdp=8))
    assert one != fingerprint(teacher(parameters="bfloat16"), True)


def test_the_digest_sees_a_bit_and_an_exchange(teacher):
    known, params = teacher().parameters(True), teacher().load(True, make_mesh(ALONE))
    expected = digest(params, known)
    name = "layers.blocks.0.mlp.up_proj.kernel"
    bits = jax.lax.bitcast_convert_type(params[name], jnp.uint32)
    flipped = bits.at[1, 3, 5].set(bits[1, 3, 5] ^ 1)
    exchanged = bits.at[0, 0, 0].set(bits[0, 7, 2]).at[0, 7, 2].set(bits[0, 0, 0])
    layers = bits[::-1]
    for changed in (flipped, exchanged, layers):
        value = jax.lax.bitcast_convert_type(changed, jnp.float32)
        assert digest(params | {name: value}, known) != expected


def test_precision_and_placement(teacher):
    mesh = make_mesh(RunConfig(fsdp=4, tensor=2))
    halves = teacher(parameters="bfloat16").load(True, mesh)
    assert {value.dtype for value in halves.values()} == {jnp.dtype("bfloat16")}
    kernel = "layers.blocks.0.mlp.up_proj.kernel"
    assert not halves[kernel].sharding.is_fully_replicated
    whole = teacher(placement="replicated").load(True, mesh)
    assert all(value.sharding.is_fully_replicated for value in whole.values())
    vlm = teacher(dtype="bfloat16").bind(ALONE, None, True)(teacher().load(True, make_mesh(ALONE)))
    assert vlm.dtype == jnp.bfloat16


def test_equal_frozen_parameters_are_there_once(teacher, tmp_path):
    mixers = MixersConfig(layer_types=(SLIDING, LINEAR))
    student = derive(teacher().config, mixers)
    layout, mesh = common_layout(student, teacher().config), make_mesh(ALONE)
    known, params = parameters(student, scanned=layout), teacher().load(layout, mesh)
    frozen = {n: p for n, p in params.items() if n in known and "embed" not in n}
    other, half = "layers.1.mlp.up_proj.kernel", "layers.0.mlp.up_proj.kernel"
    frozen[other] = frozen[other] + 1
    frozen[half] = frozen[half].astype(jnp.bfloat16)
    own, shared = hold_teacher(teacher(), layout, mesh, frozen, known, tmp_path)
    assert own.keys() | set(shared) == params.keys() and not own.keys() & set(shared)
    assert {other, half, "embed_tokens.embedding"} <= own.keys()
    assert {"norm.weight", "layers.1.mlp.down_proj.kernel", "lm_head.kernel"} <= set(shared)


def test_a_teacher_of_another_depth_has_a_layout_of_its_own(teacher):
    text = dataclasses.replace(teacher().config.text, layer_types=(LINEAR,) * 3)
    student = dataclasses.replace(teacher().config, text=text, family="infinite_vl")
    assert common_layout(student, teacher().config) is True
    assert teacher().layout(("a", "b", "c")) is True


def test_objectives_read_known_models():
    with pytest.raises(InfiniteVLError, match="critic"):
        register_objective("critical", lambda *args: args, models=("student", "critic"))
