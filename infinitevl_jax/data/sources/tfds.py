"""Rows of a prepared tfds data set: an image with questions and answers. Only this module and the
builders import tensorflow_datasets."""

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation, from_questions
from infinitevl_jax.data.curriculum import Curriculum
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.apart import Apart
from infinitevl_jax.data.sources.easy_vqa import EasyVqa
from infinitevl_jax.data.sources.files import options
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.locking import Lock
from infinitevl_jax.writing import storage

BUILDERS = (EasyVqa,)
NAME = re.compile(
    r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?"
)  # name, configuration and version of a data set on this disk


class Dataset:
    """A split of a prepared data set as a sequence of conversations.

    Attributes:
      curriculum: which questions of a row are asked.
    """

    curriculum = Curriculum()

    def __init__(self, name: str, folder: str | Path, split: str):
        """Prepare the data set in `folder` unless it is there.

        Args:
          name: a builder of this package, or a data set that someone prepared in `folder` with
            features image, questions, answers.
          split: in tfds' notation, such as "train[:90%]".
        """
        self.name, self.split = name, split
        builder = _builder(name, folder)
        missing = {"questions", "answers"} - set(builder.info.features)
        if missing:
            raise InfiniteVLError(
                f"data set {name} in {folder} has no feature {', '.join(sorted(missing))}",
                "rows hold image (bytes), questions and answers (lists of text)",
            )
        decoders = (
            {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        )
        try:
            self._rows = builder.as_data_source(split=split, decoders=decoders)
            found = len(self._rows) > 0
        except Exception:  # tfds raises whatever its parser, its assertions or the files' reader do
            found = False
        if not found:
            known = ", ".join(
                f"{k} ({v.num_examples:,} rows)" for k, v in builder.info.splits.items()
            )
            raise InfiniteVLError(
                f"data set {name} has no rows in {split!r}",
                f"splits: {known}; slices read train[:90%]",
            )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def title(self) -> str:
        """Name and split, as errors show them."""
        return f"{self.name} {self.split}"

    def __getitem__(self, number: int) -> Conversation:
        """Row `number`: its image, then a turn for each question.

        Raises BadRow for a row that cannot be read: no image bytes or no text where they are
        expected, text that is not UTF-8, or unequal numbers of questions and answers.
        """
        number = range(len(self))[number]

        def bad(reason: str, cure: str) -> BadRow:
            return BadRow(self.title, number, reason, cure)

        try:
            row = self._rows[number]
            image, questions, answers = row.get("image", b""), row["questions"], row["answers"]
        except Exception as error:  # of array_record, protobuf or tfds: each has its own
            reason = f"it cannot be read: {str(error).strip()[:200] or type(error).__name__}"
            raise bad(reason, "prepare the data set again") from error
        if not isinstance(image, bytes):
            raise bad(
                f"its image is of type {type(image).__name__}", "store a picture file's bytes"
            )
        try:
            questions, answers = _texts(questions), _texts(answers)
        except UnicodeDecodeError as error:
            raise bad(f"its text is not UTF-8: {error}", "write the row again as UTF-8") from error
        except TypeError as error:
            raise bad(str(error), "declare tfds.features.Sequence(tfds.features.Text())") from error
        if len(questions) != len(answers) or not questions:
            reason = f"it has {len(questions)} questions and {len(answers)} answers"
            raise bad(reason, "give one answer to each question, and at least one question")
        return from_questions(image, questions, answers)


def _texts(values: Sequence) -> list[str]:
    """A list of texts; numbers become text. Raises TypeError for anything else."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise TypeError(f"a {type(values).__name__} stands where a list of texts is expected")
    return [_text(value) for value in values]


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if not isinstance(value, str | int | float | np.generic):
        raise TypeError(f"a {type(value).__name__} stands where a text is expected")
    return str(value)


def _builder(name: str, folder: str | Path) -> tfds.core.DatasetBuilder:
    """A builder of this package, or a prepared data set on this disk. Nothing is downloaded."""
    made_here = {builder.name: builder for builder in BUILDERS}
    if "://" in str(folder):
        raise InfiniteVLError(
            f"train.data.folder is {str(folder)!r}", "name a folder on this machine"
        )
    if name in made_here:
        with storage(folder):
            return _prepared(made_here[name], Path(folder))
    with contextlib.suppress(Exception):  # of whatever kind: there is no data set that can be read
        if NAME.fullmatch(name):
            return tfds.core.read_only_builder.builder_from_files(name, data_dir=str(folder))
    raise InfiniteVLError(
        f"there is no data set {name!r}, neither among the builders nor prepared in {folder}",
        f"builders: {', '.join(made_here)}; or put a prepared tfds data set (array_record) at"
        f" {Path(folder) / name}",
    )


def _prepared(kind: type[tfds.core.DatasetBuilder], folder: Path) -> tfds.core.DatasetBuilder:
    """A builder of this package with its files, which the first of several runs writes."""
    builder = kind(data_dir=str(folder), file_format="array_record")
    if not Path(builder.data_dir).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(Lock(folder / f".{kind.name}.lock", str(folder), wait=True))
            for silence in (contextlib.redirect_stderr, contextlib.redirect_stdout):
                stack.enter_context(
                    silence(io.StringIO())
                )  # tfds draws three nested progress bars for a second's work
            kind(data_dir=str(folder), file_format="array_record").download_and_prepare()
        builder = kind(data_dir=str(folder), file_format="array_record")
    return builder


class Options(Curriculum, frozen=True):
    """Options of data sets, with those of `Curriculum`.

    Attributes:
      apart: each question is a row of its own, with its image.
    """

    apart: bool = False


def open_tfds(config: SourceConfig, split: str) -> Source:
    """Open a data set by its name and folder."""
    chosen = options(config, Options)
    dataset = Dataset(config.name, config.folder, split)
    if chosen.apart:
        return Apart(dataset)
    dataset.curriculum = chosen
    return dataset


register_source("tfds", open_tfds)
