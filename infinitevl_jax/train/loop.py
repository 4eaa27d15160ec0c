"""The training loop: prepare, restore or start, step, save, evaluate, plot."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from infinitevl_jax.config.presets import Preset
from infinitevl_jax.config.ranges import INT32
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import count_steps, skipping, train_batches
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.processes.group import group
from infinitevl_jax.sharding import kept_whole, make_mesh, own_rows
from infinitevl_jax.train.accumulate import check_accumulation
from infinitevl_jax.train.agreement import agreement
from infinitevl_jax.train.begin import begin_or_restore
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.folder import share_folder
from infinitevl_jax.train.held_out import HeldOut
from infinitevl_jax.train.log import Log, plot_log
from infinitevl_jax.train.lora import with_lora
from infinitevl_jax.train.memory import check_memory
from infinitevl_jax.train.models import RunModels
from infinitevl_jax.train.optimizer import learning_rate_factors, make_optimizer, schedule
from infinitevl_jax.train.progress import Progress
from infinitevl_jax.train.saving import Saver, Stop
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import put_batch, train_step

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Result of a run: its folder, its last checkpoint and step, and whether it finished."""

    run: Path
    checkpoint: Path
    step: int
    finished: bool


def train(preset: Preset) -> Outcome:
    """Train a preset to its end, or until Ctrl-C, SIGTERM or `train.minutes`, and log progress.

    Resumes from the last checkpoint in the output folder.

    Raises:
      InfiniteVLError: the preset, data, mesh or output folder is invalid.
    """
    config, began, together = preset.train, time.monotonic(), group()
    mesh = make_mesh(preset.run)
    ops = resolve_ops(mesh, preset.run.ops)
    check_accumulation(mesh, config)
    rows, agree = own_rows(mesh, config.data.batch), agreement(together)
    with contextlib.ExitStack() as stack:
        run, lock = share_folder(preset, together)
        stack.enter_context(lock or contextlib.nullcontext())
        source = open_mixture(config.data)
        start = together.first_then_others(
            lambda: prepare_start(preset.model, source, run, config.seed)
        )
        encoder = Encoder(source, start.processor, start.config)
        skipped = skipping(source, config.data)
        epochs = 0 if config.steps else config.epochs
        batches = train_batches(
            encoder, start.config, config.data, config.seed, skipped, epochs, rows, agree
        )
        stack.callback(batches.close)
        steps = config.steps or together.by_first_for_all(
            lambda: count_steps(encoder, config.data, config.epochs, config.seed, _counting)
        )
        if steps > INT32:
            raise InfiniteVLError(
                f"train.epochs = {config.epochs:g} are {steps:,} steps",
                f"at most {INT32:,} are counted",
            )
        models = RunModels(preset, start, mesh, ops)
        known = models.known
        factors = learning_rate_factors(known, config.trainable)
        names, frozen = list(factors), [name for name in known if name not in factors]
        optimizer = make_optimizer(config.optimizer, steps, known, factors)
        rate = schedule(config.optimizer, steps)

        stack.enter_context(jax.set_mesh(mesh))
        models.check_trained(names)
        check_memory(known, names, mesh, models.teacher_parameters, models.replicated)
        layers = {name: parameter.layers for name, parameter in known.items()}
        manifest = with_lora(start.manifest, config.lora, known, names)
        checkpoints = Checkpoints(run, start.files, manifest, config.keep, layers)

        def set_place(place: dict[str, Any]) -> None:
            batches.set_state(place["rows"])
            skipped.set_state(place["skipped"])

        def data() -> Iterator[TrainBatch]:
            aside = skipping(source, config.data)
            found = train_batches(
                encoder, start.config, config.data, config.seed, aside, rows=rows, agree=agree
            )
            with contextlib.closing(found):
                yield from found

        begin = partial(models.first_params, data)
        state = begin_or_restore(checkpoints, begin, known, names, optimizer, mesh, set_place)
        first = int(state.step)
        log = together.by_first(lambda: Log(run / "log.jsonl", first))
        if log is not None:
            stack.callback(log.close)
            if config.keep_best:
                checkpoints.best = partial(log.lowest, "held_out_loss")

        logger.info(
            f"{steps} steps of {config.data.batch} rows on {len(source):,} rows of"
            f" {source.title}, output in {run}"
        )
        logger.info(
            f"device: {_devices(mesh)}; mesh: "
            + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        )
        logger.info(f"data: {batches.workers or 'no'} worker processes")
        logger.info("activations: " + preset.run.dtype)
        sizes = [sum(known[name].size for name in group) for group in (names, frozen)]
        logger.info(f"parameters: {sizes[0]:,} trained, {sizes[1]:,} frozen")
        if whole := kept_whole(known, mesh):
            logger.info("\n  ".join(["on every device, whole:", *whole]))
        if first:
            logger.info(f"going on from step {first}")

        loss, held = models.loss(state.frozen, run)
        step_fn = partial(
            jax.jit(
                partial(train_step, loss, optimizer, accumulate=config.accumulate),
                donate_argnums=0,
            ),
            held=held,
        )
        held_out = None
        if any(source.held_out for source in config.data.mixture.values()):
            held_out = HeldOut(
                config.data, start, partial(jax.jit(loss), held=held), mesh, together
            )
        stop = Stop(math.inf if config.minutes is None else began + 60 * config.minutes)
        saver = Saver(checkpoints, lock, config, skipped, state, batches.get_state(), stop)
        del state  # the first step donates its memory
        with stop, Progress(steps, first, quiet=not together.first) as bar, saver:
            tokens, waited, since = 0, 0.0, time.monotonic()
            while True:
                step = saver.step
                unmeasured = (
                    held_out
                    and _is_due(config.evaluate_every, step, steps)
                    and not together.any(log is not None and log.has(step, "held_out_loss"))
                )
                due = together.any(saver.due)
                if unmeasured:
                    saver.save()  # before anything that can fail
                elif due:
                    saver.begin()
                if unmeasured and (found := held_out.measure(saver.state, stop)):
                    if log is not None:
                        log.write(step=step, **found)
                        checkpoints.remove_old()
                    unmeasured, tokens, waited, since = False, 0, 0.0, time.monotonic()
                if together.any(stop.asked) or step == steps:
                    break
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                for line in skipped.news():
                    if together.first:
                        logger.warning(line)
                saver.advance(step_fn, put_batch(batch, mesh), batches.get_state())
                tokens += _count(batch) * config.data.batch // len(rows)
                bar.update()
                if saver.step == first + 1:  # all operators are traced
                    logger.info("\n  ".join(["what ran:", *ops.report()]))
                if log is not None and _is_due(config.log_every, saver.step, steps):
                    saver.check()
                    metrics = jax.device_get(saver.metrics)
                    means = {name: float(value) for name, value in metrics.means.items()}
                    now = time.monotonic()
                    speed, share = tokens / (now - since), waited / (now - since)
                    since, tokens, waited = now, 0, 0.0
                    line = {
                        "loss": float(metrics.loss),
                        **means,
                        "grad_norm": float(metrics.grad_norm),
                        **_rates(float(rate(step)), factors.values()),
                        "tokens_per_second": round(speed, 1),
                        "data_wait": round(share, 4),
                        "seconds": round(now - began, 2),
                    }
                    log.write(step=saver.step, **line)
                    figures = [f"{name.replace('_', ' ')} {x:.3f}" for name, x in means.items()]
                    bar.show(
                        saver.step,
                        [
                            f"loss {line['loss']:.4f}",
                            *figures,
                            f"{speed:,.0f} tokens/s",
                            f"{share:.0%} waiting for data",
                        ],
                    )
            path = saver.save()
        if finished := step == steps and not unmeasured:
            plot = together.by_first(lambda: _plot(run))
            logger.info(f"done: checkpoint {path}, log {run / 'log.jsonl'}, {plot}")
        else:
            logger.info(
                f"stopped at step {step} of {steps}; saved in {path}\nthe same command goes on from"
                " here"
            )
        return Outcome(run, path, step, finished)


def _rates(rate: float, factors: Iterable[float]) -> dict[str, float]:
    """Learning rates for the log: the schedule's, and of each group with another factor."""
    groups = sorted(set(factors) - {1.0}, reverse=True)
    return {"lr": rate, **{f"lr_{factor:g}": rate * factor for factor in groups}}


def _count(batch: TrainBatch) -> int:
    """Number of decoder tokens in this process's part of the batch."""
    return sum(
        int((part.token_index >= 0).sum())
        for part in (batch.prefix, batch.branches)
        if part is not None
    )


def _devices(mesh: Mesh) -> str:
    devices = mesh.devices.reshape(-1)
    return f"{len(devices)} x {devices[0].device_kind}"


def _is_due(every: int, step: int, steps: int) -> bool:
    """Whether something done every `every` steps (0: only at the end) is due after this step."""
    return step == steps or (step > 0 and every > 0 and step % every == 0)


def _counting(rows: Iterable[int]) -> Iterable[int]:
    return tqdm(rows, desc="counting tokens", leave=False, dynamic_ncols=True, disable=None)


def _plot(run: Path) -> str:
    """Plot the log. Returns a message; an error must not fail the finished run."""
    try:
        plot_log(run / "log.jsonl", run / "loss.png")
    except Exception as error:  # of fonts, disk or values
        return f"no plot ({type(error).__name__}: {error})"
    return f"plot {run / 'loss.png'}"
