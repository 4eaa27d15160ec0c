"""The program that trains on meshes, on 8 CPU devices at a tiny size: what passes, and that what is
wrong does not."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from test_train_step import GRID, TINY

from benchmarks import mesh_checks, mesh_training, meshes
from benchmarks.mesh_training import Setting, joined
from benchmarks.meshes import all_meshes, difference, main, parse_mesh, verdict
from infinitevl_jax.train.step import TrainState

MODEL = replace(
    TINY,
    text=replace(
        TINY.text, layer_types=("sliding_attention", "linear_attention"), tie_word_embeddings=False
    ),
    vision=replace(TINY.vision, depth=1, fullatt_block_indexes=(0,)),
)
LOSSES = [
    "--patches",
    "0",
    "--length",
    "32",
    "--steps",
    "5",
    "--rows",
    "2",
    "--mesh",
    "tensor=2",
    "--mesh",
    "fsdp=2",
]


class Program:
    """`python -m benchmarks.meshes` on the tiny model; compiled programs are kept between its
    calls."""

    def __init__(self, folder):
        self.folder, self.output = folder, folder / "results" / "meshes.jsonl"

    def __call__(self, *arguments: str) -> tuple[int, list[dict]]:
        """Exit code, and the lines this call has written."""
        before = self.output.read_text().splitlines() if self.output.exists() else []
        folders = [
            "--output",
            str(self.output),
            "--compilation-cache",
            str(self.folder / "programs"),
            "--commit",
            "here",
        ]
        code = main([*arguments, *folders])
        return code, [
            json.loads(line) for line in self.output.read_text().splitlines() if line not in before
        ]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "Setting", partial(Setting, MODEL, grid=GRID, peak_lr=1e-3))
        patch.setattr(meshes, "GRID", GRID)
        wide = replace(
            MODEL, initializer_range=0.5
        )  # of two heads some gradients are sums that nearly cancel
        patch.setattr(
            mesh_checks,
            "small_setting",
            lambda rows: replace(small(rows), config=wide, grid=GRID, length=32),
        )
        yield Program(tmp_path_factory.mktemp("meshes"))


small = mesh_checks.small_setting


@pytest.fixture(scope="module")
def one_gpu(program):
    """The lines of one device, that of the meshes' losses second."""
    code, lines = program("one_gpu", *LOSSES)
    assert code == 0
    return lines


@pytest.fixture
def wrong_rows(monkeypatch):
    """On a mesh every row is the first one."""
    put = mesh_training.put_batch

    def wrong(batch, mesh):
        return put(
            jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape) if x.ndim < 3 else x, batch)
            if mesh.size > 1
            else batch,
            mesh,
        )

    monkeypatch.setattr(mesh_training, "put_batch", wrong)


def test_one_gpu_and_its_noise(one_gpu):
    speed, losses, order, pairs = one_gpu
    assert [line["part"] for line in one_gpu] == ["speed", "losses", "order", "pairs"]
    assert [line["at_once"] for line in one_gpu] == [1, 1, 1, 2] and [
        line["rows"] for line in one_gpu
    ] == [1, 2, 2, 2]
    assert np.ptp(losses["loss"]) > 0.1, "rows and parameters change from step to step"
    assert difference(order["loss"], losses["loss"]) < 1e-2, (
        "two rows: only the last bit of a float32 mean"
    )
    assert 0 < difference(pairs["loss"], losses["loss"]) < 1e-2
    assert len(losses["loss"]) == 5 and speed["step_ms"]["steps"] == 2


def test_meshes_agree_with_one_gpu(program, one_gpu):
    code, lines = program("meshes", *LOSSES, "--factor", "10", "--reuse", str(program.output))
    assert code == 0 and [line["mesh"] for line in lines] == [{"tensor": 2}, {"fsdp": 2}]
    for line in lines:
        assert (
            np.abs(np.subtract(line["loss"], one_gpu[1]["loss"])).max()
            == line["difference"]
            <= line["bound"]
        )
        assert line["bound"] == 10 * max(line["noise"].values()) < 0.05
        assert (
            line["weak_scaling"] > 0
            and line["mfu"] is None
            and np.isfinite(line["grad_norm"]).all()
        )


def test_wrong_losses_fail(program, one_gpu, wrong_rows, capsys):
    code, lines = program("meshes", *LOSSES, "--factor", "10", "--reuse", str(program.output))
    assert code == 1 and all("off, allowed are" in line["problem"] for line in lines)
    assert "FAILED mesh fsdp=2: loss of step" in capsys.readouterr().out


def test_meshes_need_one_gpu(program, capsys):
    program.output.parent.mkdir(exist_ok=True)
    program.output.touch()
    assert program(
        "meshes", *LOSSES, "--reuse", str(program.output), "--noise", "order", "--remat", "none"
    ) == (1, [])
    assert "run the part one_gpu first" in capsys.readouterr().out


def test_a_mesh_that_cannot_run_does_not_take_the_others_along(program, one_gpu):
    implementations = ["--attend", "mosaic_gpu", "--noise", "order"]
    code, lines = program("one_gpu", *LOSSES, *implementations)
    assert code == 1 and [line["part"] for line in lines] == ["speed", "losses", "order"]
    assert all(line["problem"].startswith("InfiniteVLError") for line in lines)


def test_float32(program):
    code, (alone, mesh) = program("float32", "--mesh", "fsdp=2,tensor=2")
    assert code == 0 and alone["dtype"] == "float32" and alone["trained"] == alone["parameters"]
    assert mesh["loss_apart"] <= 1e-5 and 0 < mesh["gradient_apart"] <= 1e-5


def test_float32_that_is_wrong_fails(program, wrong_rows):
    code, (_, mesh) = program("float32", "--mesh", "fsdp=2,tensor=2")
    assert code == 1 and mesh["gradient_apart"] > 1e-3


def test_checkpoint_restored_on_one(program, monkeypatch):
    code, (line,) = program("checkpoint", *LOSSES[:-4], "--mesh", "fsdp=2")
    assert code == 0 and line["arrays_equal"] > 60 and line["checkpoint_GB"] >= 0
    one = TrainState({"a": np.ones(3, np.float32)}, {}, (), np.int32(1))
    on_device = jax.tree.map(jax.numpy.asarray, one)
    assert mesh_checks.compared(one, on_device) == {"arrays_equal": 2}
    flipped = on_device._replace(
        trainable={"a": on_device.trainable["a"].at[1].set(np.nextafter(np.float32(1), 2))}
    )
    assert mesh_checks.compared(one, flipped) == {
        "problem": ".trainable['a'] differs after it was restored"
    }


def test_verdict():
    figures = {"loss": [3.0, 2.5, 2.0], "grad_norm": [1.0, 1.0, 1.0]}
    assert verdict(figures, [3.0, 2.5, 2.25], 0.25) == {"difference": 0.25, "difference_at": 3}
    assert (
        verdict(figures, [3.0, 2.0, 2.0], 0.25)["problem"]
        == "loss of step 2 is 0.5 off, allowed are 0.25"
    )
    assert (
        verdict(figures | {"loss": [3.0, np.nan, 2.0]}, [3.0, 2.5, 2.0], 9.0)["problem"]
        == "the loss of step 2 is nan"
    )
    assert (
        verdict(figures | {"grad_norm": [1.0, 1.0, np.inf]}, figures["loss"], 9.0)["problem"]
        == "the grad_norm of step 3 is inf"
    )
    assert "problem" in verdict(
        figures, figures["loss"], np.nan
    )  # noise that is not a number allows nothing


def test_rows_do_not_depend_on_their_number():
    two, four = (
        Setting(MODEL, rows=rows, steps=2, length=24, images=1, grid=GRID).batches
        for rows in (2, 4)
    )
    batch = joined(four[1])
    assert batch.branches.tokens.shape == (4, 24) and batch.branches.positions.shape == (3, 4, 24)
    assert (
        batch.patches.pixels.shape[0] == 4
        and batch.patches.slice_reach == four[1][0].patches.slice_reach
    )
    for row in (0, 1):
        assert (batch.branches.tokens[row] == two[1][row].branches.tokens[0]).all()
        assert (batch.patches.pixels[row] == two[1][row].patches.pixels[0]).all()
    assert len({float(row.weights.sum()) for rows in four for row in rows}) == 1
    assert (four[0][0].targets != four[1][0].targets).any() and (
        four[0][0].targets != four[0][1].targets
    ).any()


def test_meshes_of_a_host():
    assert all_meshes(2) == [{"data": 2}, {"fsdp": 2}, {"tensor": 2}]
    eight = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}]
    assert all_meshes(8) == eight and len(all_meshes(4)) == 5
    assert parse_mesh("fsdp=4,tensor=2") == eight[2]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--mesh", "fsdp=2,pipe=2"], "write axes among data, fsdp, tensor"),
        (["--mesh", "fsdp=-1"], "write axes among"),
        (["--mesh", "fsdp=16"], "needs 16 devices, this machine has 8"),
        (["--mesh", "fsdp=4", "--rows", "6"], "does not divide over the 4 parts of fsdp=4"),
        (["--mesh", "tensor=2", "--rows", "3"], "an even number"),
        (["speed"], "choose of one_gpu, meshes, float32, checkpoint"),
        (["--steps", "3"], "more are needed"),
    ],
)
def test_arguments_that_cannot_work(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--commit", "here"])
    assert said in capsys.readouterr().err
