"""The compilation cache: kept in the user's cache folder, optional, shown by `--version`."""

import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from infinitevl_jax import compilation

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)
HITS, MISSES = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture(autouse=True)
def unset():
    """JAX's settings as users have them, without the folder that the tests share."""
    names = (*SETTINGS, "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, True, 1.0, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder for this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infinitevl_jax" / "compiled"


@pytest.fixture
def counted():
    """Hits and misses of the cache."""
    seen = []
    listen = seen.append
    jax.monitoring.register_event_listener(listen)
    yield lambda: (seen.count(HITS), seen.count(MISSES))
    jax.monitoring.unregister_event_listener(listen)


def settings():
    return [getattr(jax.config, name) for name in SETTINGS]


def compute(seed=3):
    return jax.jit(lambda x: jnp.cos(x) * seed + 1)(jnp.arange(7.0))


def test_a_program_is_compiled_once(home, counted, said):
    before = settings()
    for expected in ((0, 1), (1, 1)):
        jax.clear_caches()
        x = jnp.arange(7.0)
        hits, misses = counted()
        with compilation.kept(True):
            jax.jit(lambda x: jnp.cos(x) * 3 + 1)(x)
        assert (counted()[0] - hits, counted()[1] - misses) == ((1, 0) if expected[0] else (0, 1))
        assert len(list(home.glob("*-cache"))) == 1
    assert settings() == before and said() == []


def test_switched_off_nothing_is_written(home, counted, said):
    with compilation.kept(False):
        jax.clear_caches()
        compute(4)
    assert not home.exists() and counted() == (0, 0) and said() == []


@pytest.mark.parametrize("obstacle", ["a file", "below a file"])
def test_a_folder_that_cannot_be_written_is_mentioned(tmp_path, monkeypatch, said, obstacle):
    (tmp_path / "taken").write_text("")
    if obstacle == "a file":
        (tmp_path / "infinitevl_jax").mkdir()
        (tmp_path / "infinitevl_jax" / "compiled").write_text("")
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path if obstacle == "a file" else tmp_path / "taken")
    )
    with compilation.kept(True):
        assert float(compute(5)[0]) == 6
    assert len(said()) == 1 and re.fullmatch(
        r"compiled programs are not kept: .*compiled cannot be written: .*", said()[0]
    )


def test_a_folder_that_jax_was_given_is_left_alone(home, tmp_path, said):
    given = str(tmp_path / "given")
    jax.config.update("jax_compilation_cache_dir", given)
    try:
        with compilation.kept(True):
            assert jax.config.jax_compilation_cache_dir == given and compilation.folder() == (
                Path(given),
                "",
            )
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not home.exists() and said() == []


def test_where_the_folder_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compilation.default_folder() == Path("/somewhere/infinitevl_jax/compiled")
    for nothing in ("", "relative"):  # invalid by the XDG specification
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert compilation.default_folder() == Path.home() / ".cache/infinitevl_jax/compiled"


def test_long_compiling_is_said(home, monkeypatch, said):
    """Said if compiling takes longer than PATIENCE, not otherwise."""
    monkeypatch.setattr(compilation, "PATIENCE", 0.05)
    lowered, compiled = (
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )
    with compilation.kept(False):
        jax.monitoring.record_event_duration_secs(lowered, 0.0)
        jax.monitoring.record_event_duration_secs(compiled, 0.0)
        time.sleep(0.2)
        assert said() == []
        jax.monitoring.record_event_duration_secs(lowered, 0.0)
        time.sleep(0.3)
        assert said() == ["compiling ..."]
        jax.monitoring.record_event_duration_secs(compiled, 0.0)


def test_jax_tells_of_compiling():
    """JAX emits the two events that the message relies on, in this order."""
    seen = []

    def listen(event, seconds, **_):
        seen.append(event.rpartition("/")[2])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        x = jnp.arange(11.0)
        seen.clear()
        jax.jit(lambda x: x * 17 + 3)(x)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (
        seen[-2:] == ["jaxpr_to_mlir_module_duration", "backend_compile_duration"]
        and seen.count("backend_compile_duration") == 1
    )


def test_pictures_of_one_bucket_share_their_programs(home, run, folder, counted, tmp_path):
    """Asked in commands of their own, as far as the cache is concerned."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes, misses = [(12, 20), (14, 22), (20, 12), (16, 16)], []
    for i, (rows, columns) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (rows, columns, 3), np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        jax.clear_caches()
        before = counted()[1]
        assert (
            run(
                "ask",
                folder,
                "What is it?",
                "--image",
                tmp_path / f"{i}.png",
                "--max-new-tokens",
                3,
            ).exit_code
            == 0
        )
        misses.append(counted()[1] - before)
    assert misses[0] > 5 and misses[1:] == [0, 0, 0]


def test_version(home, run):
    result = run("--version")
    assert result.exit_code == 0
    for said in (
        "infinitevl_jax 0.1.0",
        f"jax {jax.__version__}, jaxlib",
        "flax ",
        "backend cpu: 8 x cpu",
        f"cache {home} (0 programs",
    ):
        assert said in result.stdout, result.stdout


def test_tests_keep_out_of_the_users_folder():
    assert "tests-cache-" in os.environ["XDG_CACHE_HOME"]
