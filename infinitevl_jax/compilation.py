"""Compiled programs, kept on disk from one run of a command to the next; and a log record where
compiling takes long."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

LARGEST = 2 << 30  # bytes of the folder: what was used longest ago makes way
PATIENCE = 2.0  # seconds of compiling that nobody needs to be told of


def default_folder() -> Path:
    """Where the user's programs keep what can be made again: $XDG_CACHE_HOME, by default
    ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "infinitevl_jax" / "compiled"


def folder() -> tuple[Path | None, str]:
    """The folder that commands use, or None and the reason why there is none. One that JAX was
    given otherwise is kept."""
    if given := jax.config.jax_compilation_cache_dir:
        return Path(given), ""
    path = default_folder()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return None, f"{path} cannot be written: {error.strerror}"
    return path, ""


@contextlib.contextmanager
def kept(wanted: bool) -> Iterator[None]:
    """Within, programs that were compiled before are read from `folder()`, if wanted, and compiling
    that takes long is logged.

    A folder that cannot be written is logged, and everything compiled.
    """
    path, reason = folder() if wanted else (None, "")
    if reason:
        logger.info(f"compiled programs are not kept: {reason}")
    changes = {"jax_enable_compilation_cache": path is not None}
    if path is not None and not jax.config.jax_compilation_cache_dir:
        changes |= {
            "jax_compilation_cache_dir": str(path),
            "jax_compilation_cache_max_size": LARGEST,
        }
        changes |= {"jax_persistent_cache_min_compile_time_secs": 0.0}  # small programs are many
    before = {name: getattr(jax.config, name) for name in changes}
    with _log_long_compiling():
        _configure(changes)
        try:
            yield
        finally:
            _configure(before)


def _configure(values: dict) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it reads its settings once


@contextlib.contextmanager
def _log_long_compiling() -> Iterator[None]:
    """Within, log "compiling ..." once a program has been compiling for PATIENCE seconds."""
    waiting: list[threading.Timer] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # what is compiled next
            timer = threading.Timer(PATIENCE, logger.info, ["compiling ..."])
            timer.daemon = True
            timer.start()
            waiting.append(timer)
        elif event == "/jax/core/compile/backend_compile_duration":
            stop()

    def stop() -> None:
        while waiting:
            waiting.pop().cancel()

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        stop()
