"""The start of a run with several processes."""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence

import jax

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.group import GRACE, HEARTBEAT, Several, group
from infinitevl_jax.processes.jax_private import launcher

logger = logging.getLogger(__name__)

WAIT = 300  # seconds in which all processes have to come
END = 60  # seconds that processes wait for one another at the end


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    local_devices: Sequence[int] | None = None,
) -> Iterator[None]:
    """Context manager of a process of a run. Enter it before any device is touched.

    Without arguments, what `jax.distributed.initialize()` finds in the environment decides: a Cloud
    TPU slice or several, GKE, SLURM, Open MPI. Without any of them, and with processes=1, it is one
    process.

    Where a process fails, the others end within seconds; where it is killed, after `HEARTBEAT`.

    Args:
      coordinator: HOST:PORT of process 0. processes: their number. process: this one's.
      local_devices: numbers of this host's GPUs that this process uses; None for what the launcher
        says, or all.

    Raises:
      InfiniteVLError: an argument is wrong, or the launcher's environment.
    """
    found = _asked(coordinator, processes, process, local_devices)
    if found is None:
        yield
        return
    _join(*found, local_devices)
    together = group()
    assert isinstance(together, Several), "jax.process_count() is 1"
    try:
        yield
    except BaseException as error:
        _end(together, error)
        raise
    else:
        together.gather(lambda: None)  # the first may have more to do


def _asked(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    local_devices: Sequence[int] | None,
) -> tuple[str | None, int | None, int | None] | None:
    """Coordinator, processes and process, each None where JAX finds it; None for one process."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    named = [flag for flag, value in given.items() if value is not None]
    if processes == 1 and coordinator is None and not process:
        return None
    if named and len(named) < len(given):
        missing = ", ".join(flag for flag in given if flag not in named)
        raise InfiniteVLError(
            f"{', '.join(named)} without {missing}",
            "give all three, or none of them where a launcher says what they are",
        )
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InfiniteVLError(
                f"--coordinator is {coordinator!r}",
                "give host and port of process 0, such as 10.0.0.1:1234",
            )
        if not 0 <= process < processes:
            raise InfiniteVLError(
                f"--process is {process} of {processes}",
                f"number the processes from 0 to {processes - 1}",
            )
        return None if processes == 1 else (coordinator, processes, process)
    if _launched() == 1:
        if local_devices is not None:
            raise InfiniteVLError(
                "--local-devices is for several processes",
                "leave it out; run.data, run.fsdp and run.tensor say how many are used",
            )
        return None
    return None, None, None


def _launched() -> int:
    """Processes that a launcher has started, as JAX finds it; 1 without a launcher."""
    try:
        found = launcher()
        return 1 if found is None else found.get_process_count()
    except Exception as error:  # a service or a variable that is not there
        raise InfiniteVLError(
            f"the launcher does not say how many processes there are: {error}",
            "give --coordinator, --processes and --process; --processes 1 trains in one process",
        ) from error


def _join(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    local_devices: Sequence[int] | None,
) -> None:
    # Its handler of SIGTERM would replace ours; a run agrees on a stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    # Where nobody answers, initialize() ends the process with a trace of C++.
    late = threading.Timer(WAIT, _too_late, [coordinator or "the launcher's", processes, process])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=None if local_devices is None else list(local_devices),
            initialization_timeout=WAIT + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=END,
        )
    except (RuntimeError, ValueError) as error:
        raise InfiniteVLError(
            f"the processes of this run cannot be joined: {str(error).splitlines()[0]}",
            "check --coordinator, --processes and --process, or what the launcher sets;"
            " --processes 1 trains in one process",
        ) from error
    finally:
        late.cancel()
    if local_devices is not None and len(jax.local_devices()) != len(local_devices):
        raise InfiniteVLError(
            f"--local-devices names {len(local_devices)} devices, this process has"
            f" {len(jax.local_devices())} ({jax.local_devices()[0].platform})",
            "it chooses among GPUs: leave it out elsewhere",
        )


def _too_late(coordinator: str, processes: int | None, process: int | None) -> None:
    who = "a process" if process is None else f"process {process} of {processes}"
    error = InfiniteVLError(
        f"{who} waited {WAIT} s for the others at the coordinator {coordinator}",
        "start all processes within that time, with one coordinator: the host of process 0, on a"
        " port that no firewall closes; --processes 1 trains in one process",
    )
    os.write(2, f"error: {error}\n".encode())
    os._exit(2)


def _end(together: Several, error: BaseException) -> None:
    """End this process by an error, unless all processes have it and end alike.

    Python's own end would wait for the others, which may wait for this process.
    """
    if together.is_shared(error):
        return
    with contextlib.suppress(Exception):  # the service may be gone
        together.leave(error)
    if isinstance(error, InfiniteVLError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).strip().splitlines()[0]
        lost = InfiniteVLError(
            f"process {together.index} of {together.count} lost the others: {reason}",
            "look for the first error in what the other processes say; the same command on all of"
            " them goes on from the last checkpoint",
        )
        print(f"error: {lost}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt | SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if together.first:  # the service of the others, until they have read it
        time.sleep(2 * GRACE)
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)
