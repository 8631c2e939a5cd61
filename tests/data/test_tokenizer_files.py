"""Files of tokenizers: whose ids count, which tokens get a role, what is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_spec(special: tuple[str, ...] = ("<s>", "</s>"), **model: Any) -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes, with numbers of two and three digits in its vocabulary."""
    tokens = [*special, *ALPHABET, "12", "34", "123"]
    merges = [("1", "2"), ("3", "4"), ("12", "3")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    spec = json.loads(backend.to_str())
    spec["model"] |= model
    return spec


def write(folder: Path, spec: dict[str, Any], /, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "RobertaTokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "Own"]
)
def test_ids_are_those_of_the_file_whatever_the_class(tmp_path, name):
    spec = byte_spec()
    digits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.pre_tokenizer = digits
    text = "1234 and 12 and 123"
    expected = backend.encode(text).ids
    assert len(expected) == len(text)  # a token each, for numbers are divided
    folder = write(
        tmp_path,
        json.loads(backend.to_str()),
        tokenizer_class=name,
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode([text])[0].tolist() == expected
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.pad_id, tokenizer.mask_id) == (261, 262)


def test_roles_that_a_class_gives_are_found_by_their_names(tmp_path):
    spec = byte_spec(("<s>", "<pad>", "</s>", "<mask>"))
    tokenizer = load_tokenizer(write(tmp_path / "a", spec, tokenizer_class="RobertaTokenizer"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 2)
    assert (tokenizer.pad_id, tokenizer.mask_id) == (1, 3)
    # A plain file gives them no role.
    plain = load_tokenizer(write(tmp_path / "b", spec))
    assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.mask_id) == (0, 2, 263, 264)


def test_roles_of_older_files(tmp_path):
    folder = write(tmp_path, byte_spec(("a!", "b!", "c!", "d!")), eos_token="b!")
    roles = {"bos_token": "a!", "eos_token": "a!", "pad_token": {"content": "c!", "lstrip": True}}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)


def test_tokens_that_only_the_config_declares(tmp_path):
    declared = {"261": {"content": "<new>", "special": False}, "0": {"content": "<s>"}}
    config: dict[str, Any] = {"eos_token": "</s>", "added_tokens_decoder": declared}
    tokenizer = load_tokenizer(write(tmp_path / "a", byte_spec(), **config))
    assert tokenizer.encode(["<new>"])[0].tolist() == [261]
    assert (tokenizer.pad_id, tokenizer.mask_id) == (262, 263)
    declared["270"] = declared.pop("261")
    with pytest.raises(InputError, match=r"'<new>' the id 270, .* at 261"):
        load_tokenizer(write(tmp_path / "b", byte_spec(), **config))


def test_an_id_that_the_library_would_change_is_refused(tmp_path):
    spec = byte_spec()
    spec["added_tokens"].append(spec["added_tokens"][0] | {"content": "<late>", "id": 300})
    with pytest.raises(InputError, match=r"'<late>' the id 300, .* at 261"):
        load_tokenizer(write(tmp_path, spec))


def test_dropout_is_left_out_with_a_note(tmp_path, caplog):
    folder = write(tmp_path / "a", byte_spec(dropout=0.9))
    with caplog.at_level("WARNING"):
        tokenizer = load_tokenizer(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"tokenizer {str(folder)!r}: its dropout of 0.9 is left out"
    ]
    exact = load_tokenizer(write(tmp_path / "b", byte_spec()))
    texts = ["123 1234 12"] * 50
    assert {tuple(ids.tolist()) for ids in tokenizer.encode(texts)} == {
        tuple(exact.encode(texts[:1])[0].tolist())
    }
    assert tokenizer.fingerprint == exact.fingerprint
    caplog.clear()
    tokenizer.save(tmp_path / "saved")
    load_tokenizer(tmp_path / "saved")
    assert not caplog.records


def test_truncation_padding_and_ends_of_the_file_change_no_ids(tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_spec(("<s>", "</s>", "<pad>"))))
    backend.enable_truncation(4)
    backend.enable_padding(pad_id=2, pad_token="<pad>", length=8)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = load_tokenizer(write(tmp_path, json.loads(backend.to_str())))
    assert tokenizer.pad_id == 2
    (ids,) = tokenizer.encode(["a longer text"])
    assert (len(ids), tokenizer.decode(ids)) == (13, "a longer text")
    (ends,) = tokenizer.encode(["a </s>"], with_ends=True)
    assert (ends[0], ends[-1], len(ends)) == (0, 1, 8)
    assert tokenizer.decode(ends[1:-1]) == "a </s>"


@pytest.mark.parametrize("other", ["pad", "eos", "bos", "unk"])
def test_a_mask_with_another_role_is_refused(tmp_path, other):
    spec = byte_spec(("<s>", "</s>", "<pad>", "<x>"), unk_token="<x>")
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<x>"}
    folder = write(tmp_path, spec, **config, mask_token=config[f"{other}_token"])
    with pytest.raises(InputError, match=rf"mask and {other} are one token.*\(id \d\)"):
        load_tokenizer(folder)


def test_padding_with_the_end_is_legal(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, byte_spec(), eos_token="</s>", pad_token="</s>"))
    assert tokenizer.pad_id == tokenizer.eos_id == 1


def test_a_panic_is_one_line(tmp_path):
    model = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    folder = write(tmp_path, byte_spec((), **model, continuing_subword_prefix="##"))
    code = (
        "import sys\n"
        "from gidd_jax.data.tokenizer import load_tokenizer\n"
        "try:\n    load_tokenizer(sys.argv[1])\n"
        "except ValueError as error:\n    print(error, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"tokenizer {str(folder)!r} is damaged")
    assert "slice index" in line


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": 7}, "7 is no token"),
        ({"eos_token": {"content": None}}, "is no token"),
        ({"added_tokens_decoder": {"x": {}}}, "damaged"),
        ({"added_tokens_decoder": [1]}, "damaged"),
    ],
)
def test_damaged_configs_are_named(tmp_path, config, words):
    with pytest.raises(InputError, match=words):
        load_tokenizer(write(tmp_path, byte_spec(), **config))


def test_of_a_hub_name_only_the_files_of_a_tokenizer_are_fetched(tmp_path, monkeypatch):
    folder, asked = write(tmp_path, byte_spec()), {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        if name != "some/model":
            raise OSError("404\nnot found")
        asked["patterns"] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_tokenizer("some/model").eos_id == 1
    assert asked["patterns"]
    assert all(p.endswith((".json", ".jinja")) for p in asked["patterns"])
    with pytest.raises(InputError, match=r"'no/model' is no folder and not on the hub: 404$"):
        load_tokenizer("no/model")


def test_older_files_are_made_anew_by_transformers(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(["b a"])[0].tolist() == [6, 5]
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert roles == (2, 3, 0, 4)


def test_flags_of_added_tokens_stay(tmp_path):
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_spec()))
    backend.add_tokens([AddedToken("zz", lstrip=True)])
    tokenizer = load_tokenizer(write(tmp_path, json.loads(backend.to_str())))
    # The blanks before it are part of what it stands for.
    assert tokenizer.pieces("a   zz b") == ["a", "   zz", " ", "b"]
