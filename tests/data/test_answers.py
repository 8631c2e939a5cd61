"""Rows of prompts and answers: what is given, what is learnt, what is refused."""

import dataclasses
import json
import logging as std_logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from answer_files import answers_tokenizer, reversals, write_records, write_tokenizer

from gidd_jax.cli import load_config
from gidd_jax.data import answers
from gidd_jax.data.pipeline import TrainBatches, validation_batches
from gidd_jax.data.preparation import prepare
from gidd_jax.data.sources import run_tokenizer, train_sources, validation_source
from gidd_jax.errors import InputError
from gidd_jax.settings import Settings


@pytest.fixture
def tokenizer(tmp_path):
    return answers_tokenizer(tmp_path / "tokenizer")


def data_settings(tmp_path, records, **changes):
    config = load_config("sft")
    config.data.update(path=str(write_records(tmp_path / "records.jsonl", records)))
    config.data.update(tokenizer=str(write_tokenizer(tmp_path / "tokenizer")), validation="last:2")
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config).data


def decoded(tokenizer, ids):
    return " ".join(tokenizer.backend.id_to_token(int(i)) for i in ids)


def rows_of(tokenizer, records, seq_len=16):
    return answers.answer_rows(_Documents(records), tokenizer, seq_len, "training")


class _Documents:
    num_bytes, is_random_access = 1, True

    def __init__(self, records):
        self._records = [
            record if isinstance(record, str) else json.dumps(record) for record in records
        ]

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]


def test_a_row_is_begin_prompt_answer_and_end(tokenizer):
    found = rows_of(tokenizer, [{"prompt": "w1 w2", "answer": "w3"}, {"prompt": "", "answer": ""}])
    assert [decoded(tokenizer, ids) for ids in found.ids] == ["<bos> w1 w2 w3 <eos>", "<bos> <eos>"]
    assert [marks.astype(int).tolist() for marks in found.given] == [[1, 1, 1, 0, 0], [1, 0]]
    assert found.num_bytes.tolist() == [2, 0]


def test_a_conversation_is_written_by_its_template(tokenizer):
    messages = [
        {"role": "system", "content": "w9"},
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3 w4"},
    ]
    found = rows_of(tokenizer, [{"messages": messages}])
    wanted = "<bos> <|system|> w9 <eos> <|user|> w1 w2 <eos> <|assistant|> w3 w4 <eos>"
    assert decoded(tokenizer, found.ids[0]) == wanted
    assert found.given[0].sum() == len(wanted.split()) - 3
    assert found.num_bytes.tolist() == [5]


def test_a_long_answer_is_cut_and_counted(tokenizer, caplog):
    records = [{"prompt": "w1", "answer": "w2 w3 w4 w5"}, {"prompt": "w1", "answer": "w2"}]
    with caplog.at_level(std_logging.WARNING):
        found = rows_of(tokenizer, records, seq_len=4)
    assert decoded(tokenizer, found.ids[0]) == "<bos> w1 w2 w3"
    assert found.num_bytes.tolist() == [5, 2]
    assert "1 of the 2 answers of the training split are cut at the context of 4" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "w1 w2 w3", "answer": "w1"},
            "its prompt has 3 tokens, and with the",
        ),
        ({"question": "w1"}, "has neither prompt and answer nor messages; it has: question"),
        ({"prompt": "w1", "answer": 3}, "'answer' is int, not a text"),
        ({"messages": []}, "the last of its messages must be the assistant's answer"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "must be the assistant's answer"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "no message before the answer"),
        ("{", "is not valid JSON"),
        ([1], "has neither prompt and answer nor messages; it has: list"),
    ],
)
def test_records_of_another_form_are_named(tokenizer, record, message):
    with pytest.raises(InputError, match=r"record 2 of the training split") as caught:
        rows_of(tokenizer, [{"prompt": "w1", "answer": "w2"}, record], seq_len=4)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_that_are_all_empty_are_refused(tokenizer):
    with pytest.raises(InputError, match="the answers of the training split are all empty"):
        rows_of(tokenizer, [{"prompt": "w1", "answer": ""}] * 3)


def test_batches_are_padded_with_the_end_and_marked(tmp_path):
    settings = data_settings(tmp_path, reversals(12, seed=0))
    tokenizer = run_tokenizer(settings)
    assert tokenizer.pad_id == tokenizer.eos_id
    batch = next(TrainBatches(settings, tokenizer, 16, 4, seed=0))
    assert set(batch) == {"tokens", "mask", "given"}
    for tokens, mask, given in zip(batch["tokens"], batch["mask"], batch["given"], strict=True):
        assert (tokens[~mask] == tokenizer.eos_id).all()
        assert not given[~mask].any()
        digits = tokens[mask][1:-1]
        half = len(digits) // 2
        assert (digits[:half] == digits[half + 1 :][::-1]).all()
        assert given.sum() == 1 + half + 1  # the begin, the digits, the word that ends them
    validation = validation_batches(settings, tokenizer, 16, 2)
    records, num_bytes, marks = validation_source(settings, tokenizer, 16)
    assert marks is not None
    free = sum(int((~marks[i]).sum()) for i in range(len(records)))
    assert validation.num_tokens == free
    assert validation.num_bytes == num_bytes.sum() > 0


def test_parquet_holds_the_same_records(tmp_path):
    records = reversals(6, seed=1)
    settings = data_settings(tmp_path, records)
    table = pyarrow.Table.from_pylist([record | {"number": i} for i, record in enumerate(records)])
    pyarrow.parquet.write_table(table, tmp_path / "records.parquet")
    tokenizer = run_tokenizer(settings)
    changes = {"data.path": str(tmp_path / "records.parquet")}
    parquet = data_settings(tmp_path, records, **changes)
    ours, theirs = (train_sources(s, tokenizer, 16)[0].records for s in (settings, parquet))
    assert len(ours) == len(theirs) == 4
    for i in range(4):
        np.testing.assert_array_equal(ours[i], theirs[i])


def test_texts_and_datasets_hold_no_records(tmp_path):
    (tmp_path / "some.txt").write_text("w1 w2\n\nw3")
    for path, message in (
        (str(tmp_path / "some.txt"), "holds no records: give .jsonl or .parquet"),
        ("tfds:lm1b", "records are read from .jsonl and .parquet alone"),
    ):
        settings = data_settings(tmp_path, reversals(3, seed=0), **{"data.path": path})
        with pytest.raises(InputError, match=message):
            train_sources(settings, run_tokenizer(settings), 16)


def test_characters_are_those_of_prompts_and_answers(tmp_path):
    changes = {"data.tokenizer": f"chars:{tmp_path / 'characters.txt'}"}
    settings = data_settings(tmp_path, [{"prompt": "äb", "answer": "c"}] * 4, **changes)
    run_tokenizer(settings)
    assert set((tmp_path / "characters.txt").read_text()) - {"\n"} == set("äbc")


def test_shards_are_refused(tmp_path):
    """They would be read as texts, whose prompts are noised and learnt like the rest."""
    settings = data_settings(tmp_path, reversals(6, seed=0))
    texts = [{"text": f"w{i} w{i + 1}"} for i in range(8)]
    options = {"seq_len": 16, "validation": "last:2", "text_key": "text"}
    options |= {"txt_documents": "file", "num_workers": 1, "shard_size": 4}
    source = str(write_records(tmp_path / "texts.jsonl", texts)), settings.tokenizer
    with pytest.raises(InputError, match="data mode 'answers': shards do not say what"):
        prepare(*source, tmp_path / "no", mode="answers", **options)
    prepare(*source, tmp_path / "shards", mode="packed", **options)
    of_shards = dataclasses.replace(settings, path=str(tmp_path / "shards"))
    for read in (train_sources, validation_source):
        with pytest.raises(InputError, match="holds shards, which do not say what is a prompt"):
            read(of_shards, run_tokenizer(settings), 16)
