"""Rows of a prepared data set, by number: the one place that talks to tensorflow_datasets."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from infinitevl_jax.data.easy_vqa import EasyVqa
from infinitevl_jax.errors import BadRow, InfiniteVLError

BUILDERS = (EasyVqa,)


class Row(NamedTuple):
    """One picture (its file's bytes, b"" for none) and what is asked about it."""

    image: bytes
    questions: list[str]
    answers: list[str]


class Source:
    """A split of a data set as a sequence of `Row`."""

    def __init__(self, name: str, folder: str | Path, split: str):
        """Prepare the data set in `folder` unless it is there.

        Args:
          name: a builder of this package, or a data set that someone prepared in `folder` with features image, questions, answers.
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
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
        try:
            self._rows = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, KeyError, AssertionError, IndexError) as error:
            known = ", ".join(f"{k} ({v.num_examples:,} rows)" for k, v in builder.info.splits.items())
            raise InfiniteVLError(f"data set {name} has no rows in {split!r}", f"splits: {known}; slices read train[:90%]") from error

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def title(self) -> str:
        """Name and split, as errors call this data set."""
        return f"{self.name} {self.split}"

    def __getitem__(self, number: int) -> Row:
        """Row `number`. Raises BadRow for one whose texts are not UTF-8, or not as many questions as answers."""
        row = self._rows[int(number)]
        try:
            questions, answers = _texts(row["questions"]), _texts(row["answers"])
        except UnicodeDecodeError as error:
            raise BadRow(self.title, int(number), f"its text is not UTF-8: {error}", "write the row again as UTF-8") from error
        if len(questions) != len(answers) or not questions:
            reason = f"it has {len(questions)} questions and {len(answers)} answers"
            raise BadRow(self.title, int(number), reason, "give one answer to each question, and at least one question")
        return Row(row.get("image", b""), questions, answers)

    def readable(self) -> Iterator[Row]:
        """All rows that can be read, for statistics; the others are named when their turn comes."""
        for number in range(len(self)):
            with contextlib.suppress(BadRow):
                yield self[number]


def _texts(values: Sequence) -> list[str]:
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values]


def _builder(name: str, folder: str | Path) -> tfds.core.DatasetBuilder:
    made_here = {builder.name: builder for builder in BUILDERS}
    if name in made_here:
        builder = made_here[name](data_dir=str(folder), file_format="array_record")
        # tfds draws three nested progress bars for a second's work
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        return builder
    try:
        return tfds.builder(name, data_dir=str(folder))
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise InfiniteVLError(
            f"there is no data set {name!r}, neither among the builders nor prepared in {folder}",
            f"builders: {', '.join(made_here)}; or put a prepared tfds data set (array_record) at {Path(folder) / name}",
        ) from error
