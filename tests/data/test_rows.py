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


@pytest.mark.parametrize("largest", [0.2, 0.5])
def test_empty_tokens_are_the_references(golden_scaling, largest):
    data = golden_scaling("s05_noising.npz")
    want, labels = data[f"empty_tokens/{largest}"], data["labels"]
    counts = []
    for row, ids in enumerate(labels):
        share = np.float32(data["u_empty_frac"][row] * np.float32(largest))
        count = rows.num_empty(13, float(share))
        places = data["empty_permutation"][row][:count]
        found = rows.insert_empty(ids, places, min(13 + count, 13), pad_id=2)
        # With four of them at 0.2 its buffer is too short: position 0 has the last token, not its.
        start = int(largest == 0.2 and count == 4)
        np.testing.assert_array_equal(found[start:], want[row][start:])
        if start:
            assert want[row][0] == ids[-1]
            assert found[0] == 2
        counts.append(count)
    assert counts == ([0, 4, 3, 4, 1] if largest == 0.2 else [0, 13, 11, 13, 1])


@pytest.mark.parametrize("num_tokens", [40, 30, 1])
def test_empty_tokens_stand_anywhere_between_the_others(num_tokens):
    """A row of 40 with up to a quarter of them; the text keeps its order and loses its end."""
    ids, rng = np.arange(1, num_tokens + 1), np.random.default_rng(0)
    shares, places, lengths = [], np.zeros(40), set()
    for _ in range(2000):
        row = rows.with_empty_tokens(ids, 40, 0, 0.25, rng)
        text = row[row != 0]
        np.testing.assert_array_equal(text, ids[: len(text)])
        shares.append(np.mean(row == 0))
        places[: len(row)] += row == 0
        lengths.add(len(row))
        # Nothing is cut while there is room.
        assert len(row) == 40 or len(text) == num_tokens
    assert max(shares) <= 0.25 + 1 / min(lengths) if num_tokens < 40 else max(shares) <= 14 / 40
    if num_tokens == 40:
        # ceil(40 f / (1 - f)) of 40, f uniform in [0, 0.25]: f / (1 - f) is log(4 / 3) / 0.25 - 1
        wanted = np.log(1 / 0.75) / 0.25 - 1 + 0.5 / 40
        np.testing.assert_allclose(np.mean(shares), wanted, atol=0.01)
        np.testing.assert_allclose(places / 2000, wanted, atol=0.04)
    np.testing.assert_array_equal(rows.with_empty_tokens(ids, 40, 0, 0.0, rng), ids)
