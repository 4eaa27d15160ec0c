"""JAX's persistent compilation cache for commands, and a log record while compiling."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

LARGEST = 2 << 30  # bytes of the folder; the least recently used programs are removed
PATIENCE = 2.0  # seconds of compiling before the message


def default_folder() -> Path:
    """The folder for compiled programs under $XDG_CACHE_HOME (default ~/.cache)."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "infinitevl_jax" / "compiled"


def folder() -> tuple[Path | None, str]:
    """The cache folder that commands use. A folder set in JAX's configuration takes precedence.

    Returns:
      The folder and "", or None and the reason why there is none.
    """
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
    """Context manager that uses the compilation cache, and logs while a program compiles.

    If the folder cannot be written, this is logged and everything is compiled.

    Args:
      wanted: use the cache.
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
        changes |= {"jax_persistent_cache_min_compile_time_secs": 0.0}  # there are many small ones
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
    compilation_cache.reset_cache()  # it reads its settings only once


@contextlib.contextmanager
def _log_long_compiling() -> Iterator[None]:
    """Log "compiling ..." when a program has been compiling for PATIENCE seconds."""
    waiting: list[threading.Timer] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":  # compilation comes next
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
