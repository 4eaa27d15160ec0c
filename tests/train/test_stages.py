"""Stages as presets: an attention teacher, its mixers replaced and aligned, distilled, tuned."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from infinitevl_jax import InfiniteVL, compilation
from infinitevl_jax.checkpoints import load_params, read_config
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
DATA = [
    "train.data.name=tiny_vqa",
    "train.data.train=train[:75%]",
    "train.data.held_out=''",
    "train.data.batch=8",
    "train.data.questions=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.steps=4",
]
PACKED = [  # of the forms of a row the one whose step compiles fastest
    "train.data.batch=4",
    "train.data.questions=0",
    "train.data.options={}",
    "train.data.prefix_length=0",
    "train.data.length=64",
    "train.data.patches=128",
]


@pytest.fixture(scope="module", autouse=True)
def kept_programs():
    with compilation.kept(True):
        yield


class Stages:
    """Runs one stage after the other, in folders of their own."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def run(self, name, preset, *changes):
        """A shipped preset on tiny data, into the folder `name`."""
        own = [f"train.output={self.folder / name}", f"train.data.folder={self.data}"]
        return train(load_preset(ROOT / "configs" / f"tiny_{preset}.toml", [*DATA, *own, *changes]))

    def align(self, name, *changes):
        teacher = [f"{key}.from={self.folder / 'teacher'}" for key in ("model", "teacher")]
        mixers = [
            "model.mixers.initialise.tokens=400",
            "model.mixers.layer_types=['sliding_attention', 'linear_attention']",
        ]
        return self.run(name, "layerwise", *teacher, *mixers, *PACKED, *changes)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tiny_data):
    stages = Stages(tmp_path_factory.mktemp("stages"), tiny_data)
    stages.teacher = stages.run("teacher", "teacher", "train.data.options.opening=''").run
    stages.aligned = stages.align("aligned").run
    return stages


def newest(run):
    return max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))


def weights(run):
    return load_params(newest(run), scanned=False)[1]


def test_a_student_is_derived_and_aligned(stages):
    config = read_config(newest(stages.aligned))
    assert config.text.layer_types == (SLIDING, LINEAR) * 2 and config.text.sliding_window == 32
    assert config.text.num_linear_heads == 4 and config.family == "infinite_vl"
    student, teacher = weights(stages.aligned), weights(stages.teacher)
    assert student.keys() == parameters(config, scanned=False).keys()
    for name, value in student.items():
        if ".self_attn." not in name or not name.startswith("layers"):  # frozen
            assert np.asarray(value).tobytes() == np.asarray(teacher[name]).tobytes(), name
    kernel = "layers.0.self_attn.q_proj.kernel"  # copied, then trained
    assert not jnp.array_equal(student[kernel], teacher[kernel])
    assert jnp.allclose(student[kernel], teacher[kernel], atol=0.02)
    lines = read_log(stages.aligned / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["relative_error"] < 1 and line["loss"] > 0 for line in lines)
    assert InfiniteVL.from_pretrained(newest(stages.aligned)).config == config


def test_only_the_teachers_mixers_exist_twice(stages, said):
    again = stages.align("aligned")
    assert again.finished
    known = parameters(read_config(newest(stages.teacher)), scanned=False)
    mixers = [n for n in known if n.startswith("layers") and ".self_attn." in n]
    own = sum(known[name].size for name in mixers)
    (line,) = [line for line in said() if line.startswith("teacher:")]
    assert line.endswith(f", {own:,} parameters of its own")


def test_resumed_with_its_teacher_it_is_the_same_to_the_bit(stages):
    expected, place = weights(stages.aligned), stages.folder / "resumed"
    shutil.copytree(stages.folder / "aligned", place)
    shutil.rmtree(place / "checkpoints" / "4")
    done = stages.align("resumed")
    assert done.step == 4
    for name, value in weights(done.run).items():
        assert np.asarray(value).tobytes() == np.asarray(expected[name]).tobytes(), name


def test_another_teacher_is_refused(stages):
    other = shutil.copytree(newest(stages.teacher), stages.folder / "copy")
    change = f"teacher.from={other}"
    stages.align("other", change)
    shutil.rmtree(other)
    shutil.copytree(stages.teacher / "checkpoints" / "2", other)
    with pytest.raises(InfiniteVLError, match="are not those of the teacher that the run"):
        stages.align("other", change)
    with pytest.raises(InfiniteVLError) as caught:
        stages.align("other")
    assert [item.split(":")[0] for item in caught.value.items] == ["teacher.from"]


def test_what_the_objective_does_not_compare_must_not_train(stages):
    """Its gradient is 0, and weight decay would shrink it."""
    only = "train.objective.layer_types=['linear_attention']"
    for changes, name in (
        (["train.trainable=['.*']"], r"\S+"),
        ([only], r"layers\.0\.self_attn\.\S+"),
    ):
        with pytest.raises(InfiniteVLError, match=f"matches {name}, which the objective"):
            stages.align("wide", *changes)


def test_distillation_with_learning_rates_then_tuning(stages):
    source = [f"model.from={stages.aligned}", f"teacher.from={stages.teacher}"]
    objective = ["train.objective.temperature=2.0", "train.objective.cross_entropy=0.1"]
    held_out = "train.data.held_out=train[75%:]"
    tuned = stages.run("distilled", "distill", *source, *objective, *PACKED, held_out).run
    lines = read_log(tuned / "log.jsonl")
    assert {"kl", "cross_entropy", "accuracy", "agreement"} <= lines[0].keys()
    loss = 4 * lines[0]["kl"] + 0.1 * lines[0]["cross_entropy"]
    np.testing.assert_allclose(lines[0]["loss"], loss, rtol=1e-5)
    assert all(line["lr_0.1"] == pytest.approx(0.1 * line["lr"]) for line in lines if "lr" in line)
    assert {"held_out_loss", "held_out_kl", "held_out_rows"} <= lines[-1].keys()
    before, after = weights(stages.aligned), weights(tuned)
    for name in before:
        same = np.asarray(before[name]).tobytes() == np.asarray(after[name]).tobytes()
        assert same == name.startswith(("embed_tokens.", "visual.")), name
    moved = {n: float(jnp.abs(after[n] - before[n]).mean()) for n in before}
    ratio = moved["layers.1.self_attn.q_proj.kernel"] / moved["layers.1.mlp.up_proj.kernel"]
    assert 4 < ratio < 25  # Adam's first steps have the size of the learning rate

    end = stages.run("tuned", "tune", f"model.from={tuned}")
    assert end.finished and "exact" in read_log(end.run / "log.jsonl")[-1]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        (["train.objective.name=distill"], "compares with a teacher, and the preset has none"),
        (["teacher.from={teacher}"], "has a teacher, which the objective 'supervised' does not"),
        (["teacher.from=no_such", "train.objective.name=distill"], "which is no folder"),
        (
            ["model.mixers.layer_types=['linear_attention']", "model.mixers.num_linear_heads=3"],
            "num_linear_heads is 3, the attention of model.from has 4",
        ),
        (
            ["model.mixers.layer_types=['linear_attention']", "model.mixers.expand_v=1.0"],
            "values 24 wide",
        ),
        (["model.mixers.layer_types=['full_attention']"], "layer_types has full_attention"),
    ],
)
def test_what_does_not_fit_is_refused(stages, changes, culprit):
    changes = [change.format(teacher=stages.teacher) for change in changes]
    with pytest.raises(InfiniteVLError, match=culprit):
        stages.run("refused", "tune", f"model.from={stages.teacher}", *changes)
    shutil.rmtree(stages.folder / "refused")
