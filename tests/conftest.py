"""Tests run on the CPU with 8 devices. This is configured before jax is imported."""

import os
import tempfile

from quick import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
# XLA's thread pool, one per core by default. A device that runs an interpreted kernel blocks a
# thread until the other devices arrive, and copying operands needs another: with 8 or fewer, a
# kernel on 8 devices deadlocks.
os.environ["NPROC"] = "16"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu compiles for pods here; there is no pod to ask
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # test workers compile side by side
os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory(
    prefix="tests-cache-"
)  # commands keep compiled programs there, not in the user's folder
os.environ["XDG_CACHE_HOME"] = _cache.name
# Where Python is told to keep no bytecode, workers and the processes that tests start would compile
# the sources of JAX anew, 2 to 3 seconds each: they share a folder that goes with this run.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(_cache.name, "bytecode"))

import gc  # noqa: E402
import logging  # noqa: E402
import signal  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

# A shell that starts tests in the background makes them, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Many tests compile the same programs for models of their own: each process keeps what it has
# compiled. The commands that tests run have their own folder, as users have.
jax.config.update("jax_compilation_cache_dir", os.path.join(_cache.name, "compiled-here"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

jax.devices()  # reads the flags
del os.environ[
    "XLA_FLAGS"
]  # libtpu would read them as well, and ends the process where it does not know one

# There are many long-lived objects; garbage collection at the default rate takes 3 % of the time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with the prepared data set `tiny_vqa`."""
    from tiny_run import prepare_tiny_vqa

    return prepare_tiny_vqa(tmp_path_factory.mktemp("data"))


@pytest.fixture
def said(caplog):
    """said() is what the package has logged in this test."""
    caplog.set_level(logging.INFO, "infinitevl_jax")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.partition(".")[0] == "infinitevl_jax"
    ]


LONGEST = (  # files, the longest first
    "test_pods",
    "test_processes",
    "test_resume",
    "test_attention_tpu",
    "test_gated_delta_rule_tpu",
    "test_tpu_scores",
    "test_attention_tpu_scores",
    "test_tpu_layer_score",
    "test_matrix",
    "test_objectives",
    "test_stages",
    "test_lora_runs",
    "test_smollm2",
    "test_mutations",
)


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that none of them runs alone at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
