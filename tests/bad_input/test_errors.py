import pickle

from infinitevl_jax.errors import BadRow, InfiniteVLError


def test_a_bad_row_crosses_to_another_process():
    error = BadRow("easy_vqa train", 7, "its answer has half an emoji, \ud83d", "mend the row")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is BadRow and isinstance(again, InfiniteVLError)
    for one in (error, again):
        assert (one.source, one.index, one.cure) == ("easy_vqa train", 7, "mend the row")
        assert one.reason == "its answer has half an emoji, \\ud83d"
        assert one.culprit == "easy_vqa train row 7: its answer has half an emoji, \\ud83d"
