"""The output folder of a run: owner, lock, leftovers of earlier runs."""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from infinitevl_jax.config.objective import SupervisedConfig
from infinitevl_jax.config.presets import RENAMED, Preset, differences, to_tree
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.locking import Lock
from infinitevl_jax.processes.group import Group
from infinitevl_jax.reading import read_json
from infinitevl_jax.writing import keep_aside, storage, write_text

logger = logging.getLogger(__name__)

# settings that a resumed run may change
FREE = (
    "run.data",
    "run.fsdp",
    "run.tensor",
    "run.remat",
    "run.scan",
    "run.ops",
)
FREE += tuple(f"run.ops.{field.name}" for field in dataclasses.fields(OpsConfig))
FREE += tuple(key for key in RENAMED if key.startswith("run."))  # in presets of older runs
FREE += (
    "train.output",
    "train.minutes",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.checkpoint_async",
    "train.evaluate_every",
    "train.keep",
    "train.keep_best",
    "train.accumulate",
)
FREE += tuple(f"train.data.{key}" for key in ("folder", "images", "videos"))
FREE += ("train.data.max_skipped", "train.data.workers", "teacher.placement")
PRESET = "preset.json"


def claim_folder(preset: Preset) -> tuple[Path, Lock]:
    """Lock the run's folder and write the preset into it.

    Files of an earlier run without a checkpoint are removed; its log is kept under another name.

    Returns:
      The folder, and the lock that excludes other runs until it is closed.

    Raises:
      InfiniteVLError: the folder is in use, belongs to another configuration, is not a run's
        folder, or cannot be written.
    """
    run = Path(preset.train.output)
    with storage(run):
        if not (run / PRESET).exists() and not _steps(run) and _is_something_else(run):
            raise InfiniteVLError(
                f"{run} exists and is not the folder of a run",
                "choose another train.output=..., or move it away",
            )
        run.mkdir(parents=True, exist_ok=True)
        lock = Lock(run / ".lock", f"the run in {run}")
        try:
            _make_ready(run, to_tree(preset))
        except BaseException:
            lock.close()
            raise
    return run, lock


def share_folder(preset: Preset, together: Group) -> tuple[Path, Lock | None]:
    """`claim_folder` by the first process, for all.

    Returns:
      The folder, and the lock in the process that holds it.

    Raises:
      InfiniteVLError: as `claim_folder`; or a process has another folder of that name.
    """
    claimed = together.by_first(lambda: claim_folder(preset))
    run, lock = claimed or (Path(preset.train.output), None)
    try:
        holder = together.gather(lambda: _holder(run) if together.first else None)[0]
        together.gather(lambda: _check_same(run, holder))
    except BaseException:
        if lock:
            lock.close()
        raise
    return run, lock


def _holder(run: Path) -> str:
    try:
        return (run / ".lock").read_text("utf-8", "replace")
    except OSError:
        return ""


def _check_same(run: Path, holder: str) -> None:
    if _holder(run) != holder:
        raise InfiniteVLError(
            f"{run} is not the folder that the first process has",
            "put train.output on a file system that all hosts share, under the same path",
        )


def _make_ready(run: Path, tree: dict) -> None:
    for leftover in run.glob(".*.partial*"):  # of a killed process; the lock excludes others
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not _steps(run):
        shutil.rmtree(run / "model", ignore_errors=True)
        log = run / "log.jsonl"
        if log.exists() and log.stat().st_size:
            logger.warning(
                f"a run that left no checkpoint was here: its log is kept as {keep_aside(log)}"
            )
    elif (run / PRESET).exists():
        _compare(run, tree)
    else:
        logger.warning(f"{run} has no {PRESET}: taken for a run of this configuration")
    write_text(run / PRESET, json.dumps(tree, indent=2) + "\n")


def _compare(run: Path, tree: dict) -> None:
    try:
        stored = read_json(run / PRESET)
    except InfiniteVLError as error:
        cure = (
            f"remove it to go on from step {max(_steps(run))} with the configuration that is given,"
            " which has to be the run's own"
        )
        raise InfiniteVLError(error.culprit, cure) from None
    if isinstance(training := stored.get("train"), dict):  # runs before there were objectives
        training.setdefault("objective", to_tree(SupervisedConfig()))
    if "balance" in _table(_table(stored, "train"), "data"):
        raise InfiniteVLError(
            f"{run} holds a run of an earlier version, whose place in the data was counted"
            " differently",
            "choose another train.output=...; to go on from its weights:"
            f" model.from={run / 'checkpoints' / str(max(_steps(run)))}",
        )
    changed = [d for d in differences(stored, tree) if _free_key(d.split(":")[0]) not in FREE]
    if changed:
        more = [f"and {len(changed) - 6} more"] if len(changed) > 6 else []
        raise InfiniteVLError(
            f"{run} holds a run of another configuration:",
            "choose another train.output=..., or give the old values to go on with that run",
            [*changed[:6], *more],
        )


def _table(tree: Any, key: str) -> dict:
    found = tree.get(key)
    return found if isinstance(found, dict) else {}


def _free_key(key: str) -> str:
    """A key as `FREE` has it: what one source of a mixture may change, all may."""
    return re.sub(r"^train\.data\.sources\.[^.]+\.", "train.data.", key)


def _steps(run: Path) -> list[int]:
    folder = run / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def _is_something_else(run: Path) -> bool:
    return os.path.lexists(run) and (
        not run.is_dir() or any(not p.name.startswith(".") for p in run.iterdir())
    )
