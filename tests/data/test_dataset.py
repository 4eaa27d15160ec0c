"""Data sets are files on this machine: nothing else is looked up, and what is wrong with a name or
split is one message."""

import socket

import pytest

from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.errors import InfiniteVLError

NAMES = [
    "huggingface:squad",
    "huggingface:x/y",
    "kaggle:x",
    "mnist",
    "coco/2017",
    "gs://tfds-data/x",
    "../tiny_vqa",
    "/etc",
    "a b",
]
NAMES += ["", "a\nb", "tiny_vqa:9.9.9", "tiny_vqa/other", "x" * 5000]


@pytest.fixture
def no_network(monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n[:20])
def test_names_that_are_no_data_set(tiny_data, no_network, name):
    with pytest.raises(InfiniteVLError, match="there is no data set") as caught:
        Dataset(name, tiny_data, "train")
    assert "easy_vqa" in caught.value.cure


@pytest.mark.parametrize("folder", ["gs://bucket/data", "s3://bucket", "https://host/data"])
def test_folders_elsewhere(no_network, folder):
    with pytest.raises(InfiniteVLError, match="train.data.folder is"):
        Dataset("tiny_vqa", folder, "train")


SPLITS = [
    "train[5:3]",
    "train[:0%]",
    "train[30:]",
    "train[:1000%]",
    "train[a:b]",
    "learn",
    "",
    "train+",
    "[",
    "train[-1%]",
    "x" * 5000,
]


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: s[:20])
def test_splits_without_rows(tiny_data, no_network, split):
    with pytest.raises(InfiniteVLError, match="data set tiny_vqa has no rows in") as caught:
        Dataset("tiny_vqa", tiny_data, split)
    assert "train (24 rows)" in caught.value.cure


@pytest.mark.parametrize(
    "split, rows",
    [("train", 24), ("train[5:8]", 3), ("train[-2:]", 2), ("train[:25%]+train[75%:]", 12)],
)
def test_splits_with_rows(tiny_data, no_network, split, rows):
    assert (
        len(Dataset("tiny_vqa", tiny_data, split)) == rows
        and Dataset("tiny_vqa:1.0.0", tiny_data, split)[0].messages
    )


def test_rows_end_where_they_end(tiny_data):
    source = Dataset("tiny_vqa", tiny_data, "train")
    assert source[-1] == source[23] and len(list(source)) == 24
    with pytest.raises(IndexError):
        source[24]
