"""The training loop, read from top to bottom: prepare, restore or start, step, measure, save, plot."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from infinitevl_jax.checkpoints.manager import Checkpoints, abstract_state
from infinitevl_jax.config.presets import RENAMED, Preset, differences, to_tree
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import count_steps, held_out_batches, train_batches
from infinitevl_jax.data.source import Source
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.model.ops import resolve_ops
from infinitevl_jax.model.params import abstract
from infinitevl_jax.sharding import kept_whole, make_mesh
from infinitevl_jax.training.log import Log, plot_log
from infinitevl_jax.training.optimizer import make_optimizer, schedule, split_trainable
from infinitevl_jax.training.setup import prepare_start
from infinitevl_jax.training.step import TrainState, evaluate_batch, init_state, model_of, put_batch, state_shardings, train_step

# what may change between a run and its continuation
FREE = ("run.data", "run.fsdp", "run.tensor", "run.remat", "run.scan", "run.ops", *RENAMED)
FREE += tuple(f"run.ops.{operator.name}" for operator in dataclasses.fields(OpsConfig))
FREE += ("train.output", "train.log_every", "train.checkpoint_every", "train.evaluate_every", "train.keep", "train.data.folder")


class Outcome(NamedTuple):
    """What a run leaves: its folder, the last checkpoint (one of our checkpoint folders), and whether it came to its end."""

    run: Path
    checkpoint: Path
    step: int
    finished: bool


def train(preset: Preset, say=print) -> Outcome:
    """Run a preset to its end, or until Ctrl-C or SIGTERM; a run that finds its own checkpoints goes on from the last one.

    Raises InfiniteVLError for anything in preset, data, mesh or output folder that cannot work.
    """
    config, began = preset.train, time.monotonic()
    if jax.process_count() > 1:
        raise InfiniteVLError(
            f"{jax.process_count()} processes take part in this run, and each would write the same files",
            "train with one process; the devices of one host form the mesh",
        )
    mesh = make_mesh(preset.run)
    ops = resolve_ops(mesh, preset.run.ops)
    run = claim_folder(preset)
    source = Source(config.data.name, config.data.folder, config.data.train)
    start = prepare_start(preset.model, source, run, config.seed)
    encoder = Encoder(source, start.processor, start.config)
    batches = train_batches(encoder, start.config, config.data, config.seed)
    steps = config.steps or count_steps(encoder, config.data, config.epochs, config.seed, partial(tqdm, desc="counting tokens"))
    optimizer = make_optimizer(config.optimizer, steps)
    rate = schedule(config.optimizer, steps)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        model = model_of(start.config, preset.run, ops)
        shapes = dict(abstract(start.config, scanned=True)[1])
        names, frozen = split_trainable(list(shapes), config.trainable)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run, start.files, start.manifest, config.keep)))
        state, place = _state(checkpoints, start, shapes, names, optimizer, mesh)
        if place is not None:
            batches.set_state(place["batches"])
        first = int(state.step)
        log = stack.enter_context(contextlib.closing(Log(run / "log.jsonl", first)))

        say(f"{steps} steps of {config.data.batch} rows on {len(source):,} rows of {config.data.name}, output in {run}")
        say(f"device: {_devices(mesh)}; mesh: " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
        say("activations: " + preset.run.dtype)
        trained = sum(int(np.prod(shapes[n].shape)) for n in names)
        say(f"parameters: {trained:,} trained, {sum(int(np.prod(shapes[n].shape)) for n in frozen):,} frozen")
        if whole := kept_whole(shapes, mesh):
            say("\n  ".join(["on every device, whole:", *whole]))
        if place is not None:
            say(f"going on from step {first}")

        step_fn = jax.jit(partial(train_step, model, optimizer), donate_argnums=0)
        measure = jax.jit(partial(evaluate_batch, model))
        held_out = None
        if config.data.held_out:
            held_out = Encoder(Source(config.data.name, config.data.folder, config.data.held_out), start.processor, start.config)

        def check(metrics) -> None:
            for name in ("loss", "grad_norm"):
                value = float(getattr(metrics, name))
                if not np.isfinite(value):
                    raise InfiniteVLError(
                        f"the {name} of step {step} is {value} (the last checkpoint is of step {checkpoints.last})",
                        "lower train.optimizer.peak_lr, or look for bad rows in the data",
                    )

        def save() -> Path:
            if metrics is not None:  # a step that went wrong is never kept in place of a good one
                check(metrics)
            return checkpoints.save(state, {"batches": batches.get_state()})

        step, tokens, metrics = first, 0, None
        with _Stop() as stop, tqdm(total=steps, initial=first, unit="step", mininterval=0.5, disable=first == steps) as bar:
            since = time.monotonic()
            while step < steps and not stop.asked:
                batch = next(batches)
                tokens += _count(batch)
                jax.block_until_ready(metrics)  # at most one step runs ahead of the host
                state, metrics = step_fn(state, put_batch(batch, mesh))
                step += 1
                bar.update()
                if step == first + 1:  # traced by now
                    with tqdm.external_write_mode():
                        say("\n  ".join(["what ran:", *ops.report()]))
                if step == steps or (config.log_every and step % config.log_every == 0):
                    check(metrics)
                    line = {name: float(value) for name, value in metrics._asdict().items()}
                    now = time.monotonic()
                    speed, since, tokens = tokens / (now - since), now, 0
                    log.write(step=step, **line, lr=float(rate(step - 1)), tokens_per_second=round(speed, 1), seconds=round(now - began, 2))
                    bar.set_postfix_str(f"loss {line['loss']:.4f}, answer tokens right {line['accuracy']:.1%}, {speed:,.0f} tokens/s")
                if held_out and (step == steps or (config.evaluate_every and step % config.evaluate_every == 0)):
                    log.write(step=step, **_measure(measure, state, held_out, start.config, config.data, mesh))
                    since, tokens = time.monotonic(), 0
                if config.checkpoint_every and step % config.checkpoint_every == 0 and step < steps:
                    save()
        path = save()
    plot_log(run / "log.jsonl", run / "loss.png")
    if step < steps:
        say(f"stopped at step {step} of {steps}; saved in {path}\nthe same command goes on from here")
    else:
        say(f"done: checkpoint {path}, log {run / 'log.jsonl'}, plot {run / 'loss.png'}")
    return Outcome(run, path, step, step == steps)


def claim_folder(preset: Preset) -> Path:
    """The run's folder, with the preset written into it. What a run left that ended before its first checkpoint makes way.

    Raises InfiniteVLError if the folder belongs to another configuration, or is no run's.
    """
    run, tree = Path(preset.train.output), to_tree(preset)
    path = run / "preset.json"
    if path.exists() and not any(p.name.isdigit() for p in run.glob("checkpoints/*")):
        shutil.rmtree(run / "model", ignore_errors=True)
        (run / "log.jsonl").unlink(missing_ok=True)
    elif path.exists():
        changed = [d for d in differences(json.loads(path.read_text("utf-8")), tree) if d.split(":")[0] not in FREE]
        if changed:
            more = f"\n  and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise InfiniteVLError(
                f"{run} holds a run of another configuration:\n  " + "\n  ".join(changed[:6]) + more,
                "choose another train.output=..., or give the old values to go on with that run",
            )
    elif run.is_file() or (run.is_dir() and any(not p.name.startswith(".") for p in run.iterdir())):
        raise InfiniteVLError(f"{run} exists and is not the folder of a run", "choose another train.output=..., or move it away")
    run.mkdir(parents=True, exist_ok=True)
    aside = run / ".preset.json.partial"
    aside.write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    os.replace(aside, path)
    return run


def _state(checkpoints: Checkpoints, start, shapes, names, optimizer, mesh: Mesh) -> tuple[TrainState, dict | None]:
    """The newest checkpoint and its place in the data; or a fresh state and None."""
    begin = partial(init_state, trainable=names, optimizer=optimizer)
    if checkpoints.last is None:
        from infinitevl_jax.sharding import parameter_shardings

        params = start.params(parameter_shardings(shapes, mesh))
        shardings = state_shardings(jax.eval_shape(begin, params), mesh)
        return jax.jit(begin, out_shardings=shardings)(params), None
    wanted = jax.eval_shape(begin, shapes)
    return checkpoints.restore(abstract_state(wanted, state_shardings(wanted, mesh)))


def _measure(measure, state: TrainState, encoder: Encoder, config, data, mesh: Mesh) -> dict[str, float]:
    """Loss and exact answers over the whole held-out split."""
    params = {**state.trainable, **state.frozen}
    tallies = [measure(params, put_batch(batch, mesh)) for batch in held_out_batches(encoder, config, data)]
    total = jax.tree.map(lambda *xs: float(np.sum([np.asarray(x) for x in xs], dtype=np.float64)), *tallies)
    return {
        "held_out_loss": total.loss / total.tokens,
        "held_out_exact": total.exact / max(total.rows, 1),
        "held_out_rows": int(total.rows),
    }


def _count(batch: TrainBatch) -> int:
    """Decoder tokens of this process's part."""
    return sum(int((part.index >= 0).sum()) for part in (batch.prefix, batch.branches) if part is not None)


def _devices(mesh: Mesh) -> str:
    devices = mesh.devices.reshape(-1)
    return f"{len(devices)} x {devices[0].device_kind}"


class _Stop(contextlib.AbstractContextManager):
    """Ctrl-C or SIGTERM finish the step, save and end; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "_Stop":
        def ask(number, frame):
            self.asked = True
            signal.signal(signal.SIGINT, self._old[signal.SIGINT])
            print("\nfinishing this step, then saving", file=sys.stderr)

        # only the main thread may listen for signals
        try:
            self._old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self._old = {}
        return self

    def __exit__(self, *exception) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
