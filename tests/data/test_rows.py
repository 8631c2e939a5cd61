"""Rows: every crop is drawn, windows cover everything, and each mode cuts as it says."""

from collections import Counter

import numpy as np
import pytest

from gidd_jax.data import rows
from gidd_jax.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def test_every_crop_is_drawn_and_the_last_token_is_in_reach():
    ids = np.arange(10)
    rng = np.random.default_rng(0)
    starts = Counter(int(rows.crop(ids, 4, rng)[0]) for _ in range(7000))
    assert sorted(starts) == list(range(7))
    # 1000 expected for each: 5 standard deviations are 146.
    assert all(abs(n - 1000) < 150 for n in starts.values())
    np.testing.assert_array_equal(rows.crop(ids, 10, rng), ids)
    np.testing.assert_array_equal(rows.crop(ids, 12, rng), ids)


@pytest.mark.parametrize(
    ("num_tokens", "starts"),
    [(0, [0]), (3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 4]), (11, [0, 4, 7])],
)
def test_windows_cover_everything(num_tokens, starts):
    assert rows.window_starts(num_tokens, 4).tolist() == starts


def test_pad():
    row = rows.pad(np.array([5, 6]), 4, 1)
    assert row["tokens"].tolist() == [5, 6, 1, 1]
    assert row["mask"].tolist() == [True, True, False, False]
    assert (row["tokens"].dtype, row["mask"].dtype) == (np.int32, np.bool_)


def test_rows_of_each_mode(tokenizer):
    texts = ["alpha beta", "gamma delta epsilon", ""]
    ids = [i.tolist() for i in tokenizer.encode(texts)]
    end = [tokenizer.eos_id]
    framed = [end + i + end for i in ids]
    tokenised = rows.tokenise(texts, tokenizer, "crop")
    assert [tokenised.whole()[i].tolist() for i in range(3)] == framed
    # BOS and EOS stand for no bytes.
    sizes = [[0, *(len(tokenizer.decode([i])) for i in d), 0] for d in ids]
    assert tokenised.num_bytes.tolist() == [size for document in sizes for size in document]
    exact = len(framed[0])  # the document that exactly fills a row gains no other row
    padded = rows.cut(tokenised, "padded", exact)
    assert [padded[i].tolist() for i in range(len(padded))] == [f[:exact] for f in framed]
    cropped = rows.cut(tokenised, "crop", exact)
    assert cropped[0].tolist() == framed[0]
    assert cropped[1].tolist() == framed[1][:exact]
    assert cropped[len(cropped) - 2].tolist() == framed[1][-exact:]
    # Packed: one separator where BOS and EOS are the same token.
    stream = ids[0] + end + ids[1] + end + end
    tokenised = rows.tokenise(texts, tokenizer, "packed")
    assert tokenised.ids.tolist() == stream
    packed = rows.cut(tokenised, "packed", 4)
    starts = rows.window_starts(len(stream), 4)
    assert [packed[i].tolist() for i in range(len(packed))] == [stream[s : s + 4] for s in starts]
    assert packed.sums(tokenised.num_bytes)[0] == len(tokenizer.decode(packed[0], True))
