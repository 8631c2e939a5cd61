"""Judging texts by another model: the original's arithmetic, batches, backends, bad files."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tiny_checkpoint import write_checkpoint
from tokenizers import models, pre_tokenizers, processors

from gidd_jax.data.texts import read_texts
from gidd_jax.errors import InputError
from gidd_jax.evaluation import generated, scorers
from gidd_jax.interchange.tensors import llama_format, params_from_torch
from gidd_jax.models.llama import Llama

SPECIAL = {"pad_token": "[PAD]", "eos_token": "<eos>"}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def write_tokenizer(folder: Path, begin: bool = False) -> None:
    """Words w0 ... w64, [PAD] and <eos>; begin: the tokenizer puts <eos> in front."""
    names = [*(f"w{i}" for i in range(65)), *SPECIAL.values()]
    backend = tokenizers.Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL.values()))
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", 66)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | SPECIAL
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden) -> Path:
    """The original's golden judge as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(golden("c06_llama_state_dict.safetensors"), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def judge(folder) -> scorers.Scorer:
    return scorers.load_scorer(str(folder))


@pytest.fixture(scope="module")
def rows(golden) -> list[np.ndarray]:
    table = golden("c08_generative_ppl.npz")["token_rows"]
    return [row[row >= 0].astype(np.int32) for row in table]


@pytest.fixture(scope="module")
def exact(golden, rows) -> list[np.ndarray]:
    """-log p of each token but the first, row by row, straight from the network."""
    params = params_from_torch(
        golden("c06_llama_state_dict.safetensors"),
        llama_format(Llama(67, 64, 2, 4).shape, False),
        2,
    )
    network = Llama(67, 64, num_layers=2, num_heads=4, max_seq_len=32)
    padded = np.stack([np.pad(row, (0, 12 - len(row))) for row in rows])
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(network.apply({"params": params}, jnp.asarray(padded)), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-log_probs[i, np.arange(len(r) - 1), r[1:]] for i, r in enumerate(rows)]


def test_figures_of_the_original(golden, judge, rows):
    """Its alignment counts the first padding token after each row shorter than its batch."""
    expected = golden("c08_generative_ppl.npz")
    found = scorers.score_sequences(judge, rows, batch_size=2, align_mask_to_input=True)
    nll = found.nats.sum() / found.tokens.sum()
    assert found.tokens.sum() == expected["tokens"] == 42
    assert nll == pytest.approx(float(expected["avg_nll"]), rel=2e-6)
    assert np.exp(nll) == pytest.approx(float(expected["ppl"]), rel=1e-5)
    assert np.median(found.token_nats) == pytest.approx(float(expected["median_nll"]), rel=2e-6)
    assert found.correct.sum() / found.tokens.sum() == expected["acc"]


def test_scores_are_those_of_the_network(judge, rows, exact):
    found = scorers.score_sequences(judge, rows, batch_size=5)
    np.testing.assert_array_equal(found.tokens, [len(row) - 1 for row in rows])
    np.testing.assert_allclose(found.nats, [nll.sum() for nll in exact], rtol=2e-6)
    np.testing.assert_allclose(found.token_nats, np.concatenate(exact), rtol=2e-5)


def test_the_mesh_that_splits_a_batch_is_current(judge, rows, monkeypatch):
    found = []

    def noted(params, ids, *, network):
        found.append((jax.sharding.get_abstract_mesh().size, len(ids.sharding.device_set)))
        raise InterruptedError

    monkeypatch.setattr(scorers, "_score", noted)
    with pytest.raises(InterruptedError):
        scorers.score_sequences(judge, rows, batch_size=5)
    assert found == [(8, 8)]


def test_scores_do_not_depend_on_the_batch(judge, rows):
    whole = scorers.score_sequences(judge, rows, batch_size=5)
    for batch_size in (1, 2, 3):
        found = scorers.score_sequences(judge, rows, batch_size=batch_size)
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        np.testing.assert_allclose(found.nats, whole.nats, rtol=1e-6)
    back = scorers.score_sequences(judge, rows[::-1], batch_size=2)
    np.testing.assert_allclose(back.nats[::-1], whole.nats, rtol=1e-6)
    # the original's alignment does depend on it
    parity = [
        scorers.score_sequences(judge, rows, batch_size=n, align_mask_to_input=True).tokens.sum()
        for n in (1, 2, 5)
    ]
    assert parity == [40, 42, 43]


def test_first_choices_are_counted(judge, rows):
    """A row continued by the network's own first choices is all correct from there on."""
    network, params = judge._network, judge._params
    row = rows[0]
    for _ in range(3):
        logits = network.apply({"params": params}, jnp.asarray(row)[None])
        row = np.append(row, np.argmax(np.asarray(logits)[0, -1])).astype(np.int32)
    found = scorers.score_sequences(judge, [row, rows[0]], batch_size=2)
    assert found.correct[0] - found.correct[1] == 3


def test_precision_of_the_scorer(folder, judge, rows):
    half = scorers.load_scorer(str(folder), dtype="bfloat16")
    low = scorers.score_sequences(half, rows, batch_size=5).nats
    full = scorers.score_sequences(judge, rows, batch_size=5).nats
    assert np.all(low != full)
    np.testing.assert_allclose(low, full, rtol=0.03)


def figures(judge, texts, max_length=32, **options):
    options = {"batch_size": 2, "num_resamples": 200, "seed": 0} | options
    return generated.figures(judge, texts, max_length=max_length, **options)


def test_figures_of_texts(judge, rows, exact):
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    found = figures(judge, [*texts, "", "w3"])
    nats, tokens = sum(nll.sum() for nll in exact), sum(map(len, exact))
    assert found["num_samples"] == 7
    assert found["num_truncated"] == 0
    assert found["tokens"] == tokens == 40
    assert found["nll"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["gen_ppl"] == pytest.approx(np.exp(nats / tokens), rel=1e-5)
    low, high = found["gen_ppl_interval"]
    assert low < found["gen_ppl"] < high
    assert found["median_nll"] == pytest.approx(np.median(np.concatenate(exact)), rel=1e-5)
    assert found["distinct_1"] == len(set(np.concatenate([*rows, [3]]))) / 46
    assert found["distinct_3"] == 1.0
    assert found["mauve"] is None
    assert "--references" in found["mauve_note"]

    repeated = figures(judge, ["w1 w2 w1 w2 w1 w2", "w5 w5 w5 w5"])
    assert repeated["token_entropy"] == pytest.approx(np.log(2) / 2)
    assert repeated["distinct_2"] == 3 / 8
    assert repeated["distinct_2_per_sample"] == pytest.approx((2 / 5 + 1 / 3) / 2)
    json.dumps(repeated, allow_nan=False)


def test_long_texts_are_cut_and_counted(judge, rows, exact):
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    found = figures(judge, texts, max_length=9)
    assert found["num_truncated"] == 2
    expected = [nll[:8] for nll in exact]
    assert found["tokens"] == sum(map(len, expected))
    assert found["nll"] == pytest.approx(np.concatenate(expected).mean(), rel=1e-5)


def test_tokens_that_begin_a_text_are_context_and_no_part_of_the_entropy(tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_tokenizer(tmp_path, begin=True)
    judge = scorers.load_scorer(str(tmp_path))
    np.testing.assert_array_equal(scorers.encode(judge, ["w7 w8"], 9)[0], [66, 7, 8])
    found = figures(judge, ["w7 w7", "w7"])
    assert found["tokens"] == 3
    assert found["token_entropy"] == 0.0


def test_texts_without_two_tokens(judge):
    with pytest.raises(InputError, match="no text has two tokens"):
        figures(judge, ["w1", ""])


def test_damaged_scorer_is_an_error(tmp_path, folder, golden):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = golden("c06_llama_state_dict.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"damaged \(1 of the 64 numbers in final_norm.scale "):
        scorers.load_scorer(str(tmp_path), "jax")


def test_scores_that_are_no_numbers_are_an_error(judge, rows, monkeypatch):
    """As those of a scorer whose dtype has too small a range."""
    score = judge.score
    monkeypatch.setattr(
        judge, "score", lambda *batch: (score(*batch)[0] * np.nan, score(*batch)[1])
    )
    with pytest.raises(InputError, match="scorer's output is not a number"):
        scorers.score_sequences(judge, rows, batch_size=5)


def test_files_of_texts(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.zeros((2, 3)), texts=np.array(["one\ntwo", ""]))
    assert read_texts(tmp_path / "a.npz", "--samples") == (["one\ntwo", ""], None)
    np.savez(tmp_path / "b.npz", texts=np.array(["x"]), sampling_precision=np.array("float32"))
    assert read_texts(tmp_path / "b.npz", "--samples") == (["x"], "float32")
    (tmp_path / "c.jsonl").write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
    assert read_texts(tmp_path / "c.jsonl", "--samples").texts == ["one\ntwo", "three"]
    (tmp_path / "d.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "d.txt", "--samples").texts == ["one", "two"]


def test_bad_files_of_texts(tmp_path):
    def refused(name: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            read_texts(tmp_path / name, "--samples")

    refused("none.npz", "--samples: no such file")
    (tmp_path / "text.npz").write_text("not a zip")
    refused("text.npz", "is no file of samples")
    np.savez(tmp_path / "ids.npz", ids=np.zeros((2, 3)))
    refused("ids.npz", "holds no texts")
    pickled = np.array(["a", None], object)
    np.savez(tmp_path / "pickle.npz", allow_pickle=True, texts=pickled)
    refused("pickle.npz", "is no file of samples")
    (tmp_path / "empty.txt").write_text("")
    refused("empty.txt", "holds no text")
    (tmp_path / "a.csv").write_text("a")
    refused("a.csv", "unknown kind of file")
    (tmp_path / "key.jsonl").write_text('{"story": "x"}\n')
    refused("key.jsonl", "has no 'text'")


def test_diffusion_models_are_no_scorers(tmp_path, tmp_path_factory):
    write_checkpoint(tmp_path, tmp_path_factory.mktemp("data"), "gidd")
    with pytest.raises(InputError, match="is a diffusion model"):
        scorers.load_scorer(str(tmp_path))


def test_runs_of_the_baseline_are_scorers(tmp_path, tmp_path_factory):
    model = write_checkpoint(tmp_path, tmp_path_factory.mktemp("data"), "ar")
    judge = scorers.load_scorer(str(tmp_path))
    assert judge.backend == "jax"
    ids = scorers.encode(judge, ["a truth"], 16)[0]
    found = scorers.score_sequences(judge, [ids], batch_size=1)
    logits = model.network.apply({"params": model.params}, jnp.asarray(ids)[None])
    expected = -jax.nn.log_softmax(logits)[0, np.arange(len(ids) - 1), ids[1:]].sum()
    assert found.nats[0] == pytest.approx(float(expected), rel=1e-5)


def test_backends(folder, tmp_path, monkeypatch):
    """Llama folders need no PyTorch; other models say which extra brings it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    find_spec = scorers.importlib.util.find_spec
    monkeypatch.setattr(
        scorers.importlib.util,
        "find_spec",
        lambda name: None if name == "torch" else find_spec(name),
    )
    assert scorers.load_scorer(str(folder)).backend == "jax"
    for name, backend in ((str(tmp_path), "auto"), (str(folder), "torch")):
        with pytest.raises(InputError, match=r"pip install 'gidd-jax\[eval\]'"):
            scorers.load_scorer(name, backend)


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gidd_jax.generative_ppl", *flags],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "HOME": "/nonexistent"},
    )


def test_command(folder, rows, exact, tmp_path):
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    np.savez(tmp_path / "samples.npz", texts=np.array(texts))
    out = tmp_path / "new" / "metrics.json"
    flags = (f"--samples={tmp_path}/samples.npz", f"--scorer={folder}", f"--out={out}")
    done = command(*flags, "--batch_size=3")
    assert done.returncode == 0, done.stderr
    assert "gen_ppl " in done.stdout
    report = json.loads(out.read_text())
    assert report["nll"] == pytest.approx(np.concatenate(exact).mean(), rel=1e-5)
    assert report["backend"] == "jax"
    assert report["scorer_dtype"] == "float32"
    assert report["sampling_precision"] is None
    assert report["max_length"] == 32
    assert not list(out.parent.glob("*.part"))

    before = out.read_text()
    refused = command(*flags, "--max_length=33")
    assert refused.returncode == 2
    assert refused.stderr == ("error: --max_length=33: must lie in [2, 32], the scorer's context\n")
    assert out.read_text() == before


# Below: only where PyTorch is installed (the extra `eval`).


def test_torch_gives_the_same_figures(golden, folder, judge, rows):
    pytest.importorskip("torch")
    other = scorers.load_scorer(str(folder), "torch")
    assert (other.backend, other.max_length, other.pad_id) == ("torch", 32, 65)
    for align in (False, True):
        ours, theirs = (
            scorers.score_sequences(s, rows, batch_size=2, align_mask_to_input=align)
            for s in (judge, other)
        )
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.correct, theirs.correct)
        np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-5)
    found = scorers.score_sequences(other, rows, batch_size=2, align_mask_to_input=True)
    expected = float(golden("c08_generative_ppl.npz")["avg_nll"])
    assert found.nats.sum() / found.tokens.sum() == pytest.approx(expected, rel=2e-6)
    ours, theirs = (scorers.sequence_features(s, rows, batch_size=2) for s in (judge, other))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_llama_3_gives_the_same_figures_in_both(tmp_path, rows):
    """Grouped heads, tied embeddings, scaled rotary positions, bfloat16 weights."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    sizes = {k: v for k, v in CONFIG.items() if k not in ("model_type", "rope_theta")}
    config = transformers.LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters=rope,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ours, theirs = (
        scorers.score_sequences(scorers.load_scorer(str(tmp_path), b), rows, batch_size=5).nats
        for b in ("jax", "torch")
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_other_architectures_run_through_torch(tmp_path, rows):
    """In batches what the model's own loss is row by row."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=67, n_positions=16, n_embd=32, n_layer=1, n_head=2, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    judge = scorers.load_scorer(str(tmp_path))
    assert (judge.backend, judge.max_length, judge.pad_id) == ("torch", 16, 65)
    found = scorers.score_sequences(judge, rows, batch_size=3)
    for row, nats in zip(rows, found.nats, strict=True):
        ids = torch.tensor(row)[None].long()
        with torch.no_grad():
            mean = model(input_ids=ids, labels=ids).loss
        assert nats / (len(row) - 1) == pytest.approx(float(mean), rel=1e-5)


def test_no_causal_model(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="is no causal language model"):
        scorers.load_scorer(str(tmp_path))


def test_mauve(judge, rows):
    """Texts compared with themselves score 1; with others less."""
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 64, 12)) for _ in range(60)]
    others = ["w1 " * 6 + f"w{i % 3}" for i in range(60)]
    same = figures(judge, texts, references=texts)
    assert same["mauve"] == pytest.approx(1.0, abs=0.02)
    assert "60 references" in same["mauve_note"]
    assert figures(judge, others, references=texts)["mauve"] < 0.2
