"""A tiny checkpoint, an image, and a command runner with a shared, already compiled model."""

import av
import numpy as np
import pytest
from PIL import Image
from tiny_folder import tiny_config, tiny_model, write_folder
from typer.testing import CliRunner

from infinitevl_jax import InfiniteVL
from infinitevl_jax.cli import app


@pytest.fixture(scope="session")
def model():
    return tiny_model(tiny_config())


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cli") / "tiny", model)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "film.mp4"
    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(6):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        rng.integers(0, 255, (16, 16, 3), np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    return path


@pytest.fixture
def run(monkeypatch, model):
    """run(arguments, typed="") -> result of a command that uses the shared model."""
    monkeypatch.setattr(
        InfiniteVL, "from_pretrained", classmethod(lambda cls, folder, **options: model)
    )

    def run(*arguments, typed=""):
        return CliRunner().invoke(
            app, [str(a) for a in arguments], input=typed, catch_exceptions=False
        )

    return run
