"""Any end of a run saves its state and says where."""

import os
import signal
import time

import jax.numpy as jnp
import pytest

from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.config.train import TrainConfig
from infinitevl_jax.data.skipping import Skipped
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.locking import Lock
from infinitevl_jax.train import saving
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.saving import Saver, Stop
from infinitevl_jax.train.step import Metrics, TrainState
from infinitevl_jax.writing import StorageError


def step_fn(state, loss):
    """Like the real step, leave the state unchanged if the loss is not finite."""
    good = jnp.isfinite(jnp.float32(loss))
    state = state._replace(trainable={"a": state.trainable["a"] + good}, step=state.step + good)
    return state, Metrics(jnp.float32(loss), jnp.float32(1), jnp.float32(1))


@pytest.fixture
def run(tmp_path):
    """Make a saver with a state of step 0."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run" / ".lock", "the run") as lock:
        checkpoints = Checkpoints(tmp_path / "run", tmp_path / "model", Manifest(), 2)

        def make(**config):
            state = TrainState({"a": jnp.zeros(3)}, {}, {}, jnp.zeros((), jnp.int32))
            make.stop = Stop()
            return Saver(
                checkpoints,
                lock,
                TrainConfig(**config),
                Skipped(100, 0.1),
                state,
                {"at": 0},
                make.stop,
            )

        make.folder, make.checkpoints = tmp_path / "run" / "checkpoints", checkpoints
        yield make


def steps(run):
    return sorted(int(p.name) for p in run.folder.iterdir())


def place(run, step):
    return (run.folder / str(step) / "data" / "metadata").read_text()


def go(saver, error=None, losses=(1.0, 1.0, 1.0)):
    with saver:
        for number, loss in enumerate(losses, 1):
            saver.advance(step_fn, loss, {"at": number})
        if error:
            raise error
        saver.check()


ENDS = {
    "bad data": InfiniteVLError("the data is bad", "mend it"),
    "bad row": BadRow("rows train", 7, "a truncated picture", "mend it"),
    "full log": StorageError("no space left for log.jsonl", "free some space"),
}


@pytest.mark.parametrize("case", ENDS)
def test_an_error_says_where_the_run_is_saved(run, case):
    error = ENDS[case]
    with pytest.raises(InfiniteVLError) as caught:
        go(run(), error)
    assert steps(run) == [3] and '"at": 3' in place(run, 3).replace('"at":3', '"at": 3')
    assert caught.value.culprit == error.culprit and caught.value.items == (
        f"step 3 is saved in {run.folder / '3'}",
    )


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("a bug"), MemoryError()], ids=repr
)
def test_anything_else_passes_once_the_run_is_saved(run, said, error):
    with pytest.raises(type(error)) as caught:
        go(run(), error)
    assert (
        caught.value is error
        and steps(run) == [3]
        and said() == [f"step 3 is saved in {run.folder / '3'}"]
    )


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_state_before_a_step_that_went_wrong_is_kept(run, loss):
    saver = run()
    with pytest.raises(InfiniteVLError) as caught:
        go(saver, losses=(1.0, 1.0, loss, 1.0))
    assert caught.value.culprit == f"the loss of step 3 is {loss}" and caught.value.items[
        0
    ].startswith("step 2 is saved in ")
    assert steps(run) == [2] and "2" in place(run, 2) and float(saver.state.trainable["a"][0]) == 2


def test_nothing_learnt_nothing_saved(run):
    with pytest.raises(InfiniteVLError) as caught:
        go(run(), InfiniteVLError("the first row is bad", "mend it"), losses=())
    assert steps(run) == [] and caught.value.items == ()


def test_a_save_that_fails_is_not_tried_again(run, monkeypatch):
    tries = []

    def full(*args):
        tries.append(args)
        raise StorageError(
            "no space left for checkpoint 3", "free some space; then the same command begins anew"
        )

    saver = run()
    monkeypatch.setattr(saver.checkpoints, "save", full)
    with pytest.raises(InfiniteVLError) as caught, saver:
        for number in (1, 2, 3):
            saver.advance(step_fn, 1.0, {"at": number})
        saver.save()
    assert len(tries) == 1 and caught.value.items == ("no step is saved",)


def test_an_error_waits_for_what_is_being_written(run, monkeypatch):
    """And does not try again where that fails."""
    write = run.checkpoints._write_beside

    def slow(*args):
        time.sleep(0.1)
        if failing:
            raise StorageError("no space left for checkpoint 4", "free some space")
        return write(*args)

    monkeypatch.setattr(run.checkpoints, "_write_beside", slow)
    told, failing = [], False
    for steps_before in (1, 3):
        saver = run()
        with pytest.raises(InfiniteVLError) as caught, saver:
            for number in range(1, steps_before + 1):
                saver.advance(step_fn, 1.0, {"at": number})
            saver.begin()
            raise InfiniteVLError("the data is bad", "mend it")
        told.append(caught.value.items)
        failing = True
    assert told[0] == (f"step 1 is saved in {run.folder / '1'}",)
    assert told[1] == (
        "a checkpoint could not be written: no space left for checkpoint 4",
        "step 1 is saved",
    )
    assert steps(run) == [1]


def test_the_run_may_wait_for_its_checkpoints(run, monkeypatch):
    saver = run(checkpoint_async=False)
    monkeypatch.setattr(run.checkpoints, "_write_beside", None)
    saver.advance(step_fn, 1.0, {"at": 1})
    saver.begin()
    assert steps(run) == [1] and not saver.due


def test_an_error_is_told_before_the_save_that_then_fails(run, monkeypatch):
    saver = run()
    monkeypatch.setattr(
        saver.checkpoints,
        "save",
        lambda *_: (_ for _ in ()).throw(StorageError("no space left", "free some")),
    )
    with pytest.raises(InfiniteVLError) as caught:
        go(saver, InfiniteVLError("the data is bad", "mend it"))
    assert caught.value.culprit == "the data is bad"
    assert caught.value.items == ("step 3 could not be saved: no space left", "no step is saved")


def test_a_state_that_a_failed_step_took_along(run, said):
    def fails(state, batch):
        for array in (state.trainable["a"], state.step):
            array.delete()
        raise RuntimeError("out of memory")

    saver = run()
    with pytest.raises(RuntimeError), saver:
        saver.advance(step_fn, 1.0, {"at": 1})
        saver.save()
        saver.advance(step_fn, 1.0, {"at": 2})
        saver.advance(fails, 1.0, {"at": 3})
    assert said() == ["step 2 was lost with it", "step 1 is saved"]


def test_a_folder_that_was_replaced_is_not_written(run, tmp_path):
    saver = run()
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(InfiniteVLError, match="removed or replaced"), saver:
        saver.advance(step_fn, 1.0, {"at": 1})
        saver.save()
    assert steps(run) == []


def test_how_often(run, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    saver = run()  # every 30 minutes by default
    assert not saver.due
    saver.advance(step_fn, 1.0, {"at": 1})
    now[0] += 29 * 60
    assert not saver.due
    now[0] += 61
    assert saver.due
    saver.save()
    assert not saver.due
    saver = run(checkpoint_every=2, checkpoint_minutes=0.0)
    due = []
    for number in range(1, 5):
        saver.advance(step_fn, 1.0, {"at": number})
        now[0] += 1e6
        due.append(saver.due)
    assert due == [False, True, False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_ask_the_run_to_stop(number, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked and "finishing this step, then saving" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_ctrl_c_leaves_without_saving(run, said):
    saver = run()
    with pytest.raises(KeyboardInterrupt), saver:
        saver.advance(step_fn, 1.0, {"at": 1})
        run.stop.asked = True
        raise KeyboardInterrupt
    assert steps(run) == [] and said() == ["no step is saved"]
