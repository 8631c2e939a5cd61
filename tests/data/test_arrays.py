"""Arrays of ids as a corpus: rows as they are, their splits, what is given, and bad files."""

import numpy as np
import pytest
from tiny_corpus import first_batches, settings
from tiny_run import tiny_settings

from gidd_jax.data.arrays import with_marks
from gidd_jax.data.pipeline import (
    TrainBatches,
    _count_tokens,
    unigram_bits_per_byte,
    validation_batches,
)
from gidd_jax.data.sources import train_sources
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

L, VOCAB = 6, 9
TOKENIZER = load_tokenizer(f"ids:{VOCAB}", ends=False)


def some_rows(count=20, seed=0):
    """Distinct rows of ids, and givens: of each row some are given and some are free."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (count, L))
    ids[:, 0], ids[:, 1] = np.arange(count) % VOCAB, np.arange(count) // VOCAB
    given = rng.random((count, L)) < 0.5
    given[:, 2], given[:, 3] = False, True
    return ids, given


def array_settings(path, **changes):
    return settings(path, **{"frame": "none", "validation": "last:4", **changes})


def train_batches(path, batch_size=4, **changes):
    return TrainBatches(array_settings(path, **changes), TOKENIZER, L, batch_size, seed=1)


def held_out(path, **changes):
    return validation_batches(array_settings(path, **changes), TOKENIZER, L, 4)


def as_set(rows):
    return {tuple(row) for row in np.asarray(rows).tolist()}


def epoch(path, count, **changes):
    """The first `count` rows that training sees."""
    batches = first_batches(train_batches(path, **changes), count // 4)
    assert all(batch["mask"].all() for batch in batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def write(folder, kind, ids):
    if kind == "npy":
        np.save(folder / "rows.npy", ids.astype(np.int16))
        return folder / "rows.npy"
    if kind == "npz":
        np.savez(folder / "rows.npz", ids=ids)
        return folder / "rows.npz"
    file = folder / f"rows.{kind}.bin"
    # What is left after the last window is no row.
    np.append(ids.ravel(), [1, 1]).astype(kind).tofile(file)
    return file


@pytest.mark.parametrize("kind", ["npy", "npz", "uint16", "uint32"])
def test_rows_come_back_as_they_are(tmp_path, kind):
    ids, _ = some_rows()
    file = write(tmp_path, kind, ids)
    seen = epoch(file, 16)
    assert seen.keys() == {"tokens", "mask"}
    assert as_set(seen["tokens"]) == as_set(ids[:16])
    (batch,) = held_out(file)
    assert as_set(batch["tokens"]) == as_set(ids[16:])
    assert batch["mask"].all()


def test_equal_rows_are_held_out_together_whatever_holds_them(tmp_path):
    ids, _ = some_rows(60)
    for kind, rows in (("npy", ids), ("uint16", ids[::-1])):
        write(tmp_path, kind, np.concatenate([rows, rows]))
    found = []
    for file in ("rows.npy", "rows.uint16.bin"):
        validation = held_out(tmp_path / file, validation="hash:0.2")
        rows = np.concatenate([b["tokens"][b["mask"].any(-1)] for b in validation])
        assert len(rows) == 2 * len(as_set(rows))
        train = train_batches(tmp_path / file, validation="hash:0.2")
        assert train.num_records + len(rows) == 120
        found.append(as_set(rows))
    assert found[0] == found[1]
    assert 4 <= len(found[0]) <= 22


def test_what_is_given_follows_its_row_in_training_and_validation(tmp_path):
    ids, given = some_rows()
    np.savez(tmp_path / "rows.npz", ids=ids, given=given)
    marks = {tuple(row): mark for row, mark in zip(ids.tolist(), given, strict=True)}
    seen = epoch(tmp_path / "rows.npz", 16)
    (batch,) = held_out(tmp_path / "rows.npz")
    for part in (seen, batch):
        for row, mark in zip(part["tokens"].tolist(), part["given"], strict=True):
            np.testing.assert_array_equal(mark, marks[tuple(row)])


def test_parts_without_marks_give_nothing(tmp_path):
    ids, given = some_rows()
    np.savez(tmp_path / "marked.npz", ids=ids, given=given)
    np.save(tmp_path / "plain.npy", ids[::-1])
    path = f"1:{tmp_path / 'marked.npz'},1:{tmp_path / 'plain.npy'}"
    seen = epoch(path, 40)
    assert 0 < seen["given"].any(-1).sum() < 40
    both = list(held_out(path))
    assert sum(batch["given"].any(-1).sum() for batch in both) == 4
    assert sum(batch["mask"].any(-1).sum() for batch in both) == 8


def test_files_may_be_held_out_and_folders_be_read(tmp_path):
    ids, _ = some_rows()
    np.save(tmp_path / "a.npy", ids[:8])
    np.save(tmp_path / "b.npy", ids[8:16])
    np.save(tmp_path / "test.npy", ids[16:])
    rule = {"validation": f"path:{tmp_path / 'test.npy'}"}
    assert as_set(epoch(tmp_path, 16, **rule)["tokens"]) == as_set(ids[:16])
    (batch,) = held_out(tmp_path, **rule)
    assert as_set(batch["tokens"]) == as_set(ids[16:])


def test_a_run_continues_at_the_row_and_notices_a_changed_file(tmp_path):
    ids, given = some_rows()
    file = tmp_path / "rows.npz"
    np.savez(file, ids=ids, given=given)
    train = train_batches(file)
    batches = first_batches(train, 6)
    other = train_batches(file)
    position = train.get_state() | {"global_next_index": 12}
    other.set_state(position)
    for before, now in zip(batches[3:], first_batches(other, 3), strict=True):
        np.testing.assert_array_equal(before["tokens"], now["tokens"])
        np.testing.assert_array_equal(before["given"], now["given"])
    np.savez(file, ids=ids, given=~given)
    with pytest.raises(InputError, match=r"rows\.npz changed"):
        train_batches(file).set_state(position)


def test_settings_learn_from_the_arrays_whether_positions_are_given(tmp_path):
    ids, given = some_rows()
    np.savez(tmp_path / "marked.npz", ids=ids, given=given)
    np.savez(tmp_path / "plain.npz", ids=ids)
    for name, marked in (("marked", True), ("plain", False)):
        changes = {"data.path": str(tmp_path / f"{name}.npz"), "data.frame": "none"}
        found = with_marks(tiny_settings(tmp_path, **changes))
        assert found.data.marked == found.data.has_givens == marked
    with pytest.raises(InputError, match=r"data\.marked = True: no array of data.path="):
        with_marks(tiny_settings(tmp_path, **changes, **{"data.marked": True}))
    # A network that never saw given positions is not validated beside them.
    changes["data.validation"] = f"path:{tmp_path / 'marked.npz'}"
    with pytest.raises(InputError, match=r"marks given positions, and no array of data.path="):
        with_marks(tiny_settings(tmp_path, **changes))
    assert not with_marks(tiny_settings(tmp_path, **changes, **{"data.givens": 0.5})).data.marked


def test_rows_of_arrays_leave_no_figure_per_byte_and_given_tokens_do_not_count(tmp_path):
    ids, given = some_rows()
    np.savez(tmp_path / "rows.npz", ids=ids, given=given)
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6\n" * 20)
    of_arrays = held_out(tmp_path / "rows.npz")
    free = ids[16:][~given[16:]]
    assert (of_arrays.num_tokens, of_arrays.num_bytes) == (len(free), 0)
    counts = np.bincount(free, minlength=TOKENIZER.vocab_size)
    np.testing.assert_array_equal(of_arrays.token_counts(TOKENIZER.vocab_size), counts)
    assert of_arrays.surprise is None  # nobody looks for bytes
    both = held_out(f"1:{tmp_path / 'rows.npz'},1:{tmp_path / 'text.txt'}", txt_documents="line")
    assert both.num_bytes == 0  # not those of the texts alone
    assert both.surprise == "some of the validation rows are arrays of ids, which stand for no text"
    texts = held_out(tmp_path / "text.txt", txt_documents="line")
    assert texts.num_bytes > 0
    assert texts.surprise is None
    data = array_settings(tmp_path / "rows.npz")
    assert np.isnan(unigram_bits_per_byte(data, TOKENIZER, L, of_arrays))
    free = ids[:16][~given[:16]]
    (source,) = train_sources(data, TOKENIZER, L)
    found = _count_tokens(source.records, TOKENIZER.vocab_size, given=source.given)
    np.testing.assert_array_equal(found, np.bincount(free, minlength=TOKENIZER.vocab_size))


def bad_files():
    ids, given = some_rows()
    beyond = ids.copy()
    beyond[3, 2] = VOCAB
    ragged = np.empty(2, object)
    ragged[:] = [[1, 2], [3]]
    full = given.copy()
    full[5] = True
    return {
        "beyond": ({"ids": beyond}, "row 3 holds 9: ids of tokenizer 'ids:9' are 0 to 8"),
        "negative": ({"ids": ids - 1}, "holds -1: ids of tokenizer"),
        "short": ({"ids": ids[:, :4]}, "has rows of 4 ids, model.max_seq_len is 6"),
        "flat": ({"ids": ids[0]}, r"holds int64 \[6\]: must be ids, integers \[N, L\]"),
        "floats": ({"ids": ids * 1.0}, "holds float64"),
        "empty": ({"ids": ids[:0]}, "holds no row"),
        "ragged": ({"ids": ragged}, "holds Python objects, such as rows of unequal length"),
        "unnamed": ({"tokens": ids}, "holds tokens: must be `ids`"),
        "extra": ({"ids": ids, "mask": given}, "holds ids, mask: must be `ids`"),
        "int given": ({"ids": ids, "given": given * 1}, "`given` is int64"),
        "wide given": ({"ids": ids, "given": given[:, :3]}, r"`given` is bool \[20, 3\]"),
        "full given": ({"ids": ids, "given": full}, "every position of row 5 is given"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_arrays_are_one_line_each(tmp_path, name):
    content, message = bad_files()[name]
    np.savez(tmp_path / "rows.npz", **content)
    with pytest.raises(InputError, match=message) as error:
        train_batches(tmp_path / "rows.npz")
    assert "\n" not in str(error.value)
    assert "rows.npz" in str(error.value)


def test_bad_files_and_settings_are_one_line_each(tmp_path):
    ids, _ = some_rows()
    np.save(tmp_path / "rows.npy", ids)
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "rows.bin").write_bytes(b"\0" * 24)
    (tmp_path / "odd.uint16.bin").write_bytes(b"\0" * 25)
    (tmp_path / "small.uint32.bin").write_bytes(b"\0" * 20)
    (tmp_path / "text.txt").write_text("1 2 3\n")
    (tmp_path / "both").mkdir()
    np.save(tmp_path / "both" / "rows.npy", ids)
    (tmp_path / "both" / "README.txt").write_text("what the rows are\n")
    ragged = np.empty(2, object)
    ragged[:] = [[1, 2], [3]]
    np.save(tmp_path / "ragged.npy", ragged)
    cases = [
        ("both", {}, "both' holds both arrays of ids and texts: give one"),
        ("ragged.npy", {}, "holds Python objects, such as rows of unequal length: must be ids"),
        ("damaged.npz", {}, "is no file of arrays, or damaged"),
        ("rows.bin", {}, "rename it to .uint16.bin or .uint32.bin"),
        ("odd.uint16.bin", {}, "has 25 bytes, no whole number of uint16 ids"),
        ("small.uint32.bin", {}, "holds 5 ids, less than one row of model.max_seq_len = 6"),
        ("rows.npy", {"frame": "ends"}, "set data.frame=none"),
        ("rows.npy", {"validation": "split:test"}, "does not fit data path"),
        ("rows.npy", {"validation": "last:20"}, "leaves no training row of the 20"),
        (f"rows.npy,{tmp_path / 'text.txt'}", {}, "holds both arrays of ids and texts"),
        ("text.txt", {"validation": "last:1"}, "leaves no training document"),
    ]
    for name, changes, message in cases:
        with pytest.raises(InputError, match=message) as error:
            train_batches(f"{tmp_path}/{name}", **changes)
        assert "\n" not in str(error.value)
        assert "unsafe" not in str(error.value)


def test_texts_without_a_frame_are_windows_end_to_end(tmp_path):
    (tmp_path / "text.txt").write_text("1 2 3 4\n5 6 7 8\n0 1 2 3\n4 5 6 7 8 0 1\n")
    data = {"txt_documents": "line", "validation": "last:1"}
    assert as_set(epoch(tmp_path / "text.txt", 8, **data)["tokens"]) == {
        (1, 2, 3, 4, 5, 6),
        (7, 8, 0, 1, 2, 3),
    }
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6 7 8\n1 2 3 4\n")
    with pytest.raises(InputError, match="rows without a frame are full: 4 tokens make none of 6"):
        held_out(tmp_path / "text.txt", **data)
