"""easy-VQA as a tfds data set: 4,000 + 1,000 pictures of one coloured shape, 38,575 + 9,673
questions, in its official split.

The package `easy-vqa` contains pictures and questions. One row is a picture with all its
questions.
"""

import importlib.metadata
import json
from pathlib import Path

import tensorflow_datasets as tfds

from infinitevl_jax.errors import InfiniteVLError


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """Rows: image (PNG bytes), questions and answers (lists of equal length)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        texts = tfds.features.Sequence(tfds.features.Text())
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "questions": texts,
            "answers": texts,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="One coloured shape a picture, and questions about shape and colour.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/vzhou842/easy-VQA",
        )

    def _split_generators(self, download_manager):
        # by the installed package, not by module name: a script called easy_vqa.py would be found
        # first
        try:
            folder = Path(
                str(importlib.metadata.distribution("easy-vqa").locate_file("easy_vqa/data"))
            )
        except importlib.metadata.PackageNotFoundError as error:
            raise InfiniteVLError(
                "the data set easy_vqa needs the package easy-vqa", "pip install easy-vqa==1.0"
            ) from error
        return {split: self._generate_examples(folder / split) for split in ("train", "test")}

    def _generate_examples(self, folder: Path):
        by_image: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads((folder / "questions.json").read_text("utf-8")):
            by_image.setdefault(image, []).append((question, answer))
        for image, turns in sorted(by_image.items()):
            questions, answers = zip(*turns, strict=True)
            png = (folder / "images" / f"{image}.png").read_bytes()
            yield image, {"image": png, "questions": list(questions), "answers": list(answers)}
