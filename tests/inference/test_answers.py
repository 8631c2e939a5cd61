"""Answers of a model: where they end, in batches and one by one, and a task that is learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answer_files import answers_tokenizer, reversals, write_records, write_tokenizer
from tiny_checkpoint import random_params

from gidd_jax.cli import load_config
from gidd_jax.data.sources import run_tokenizer
from gidd_jax.errors import InputError
from gidd_jax.evaluation.corpora import open_corpora
from gidd_jax.inference.answers import answered
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.samples import Samples
from gidd_jax.settings import Settings
from gidd_jax.training.build import build_objective
from gidd_jax.training.loop import train
from gidd_jax.training.step import abstract_params, loss_and_grads

pytestmark = pytest.mark.usefixtures("on_first_device")
PROMPTS = ["1 2 3", "4 5", "6 7 8 9 0"]


def settings_in(folder, records, **changes) -> Settings:
    config = load_config("sft")
    config.model.update(
        hidden_size=32, num_layers=2, num_heads=4, max_seq_len=16, dtype="float32", start=""
    )
    config.data.update(path=str(write_records(folder / "records.jsonl", records)))
    config.data.update(tokenizer=str(write_tokenizer(folder / "tokenizer")), validation="last:8")
    config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
    config.train.update(num_steps=4, batch_size=8, eval_every=0, eval_batches=2)
    config.checkpoint.every = 1000
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Gidd:
    settings = settings_in(tmp_path_factory.mktemp("a"), reversals(20, seed=0))
    tokenizer = run_tokenizer(settings.data)
    objective = build_objective(settings, tokenizer.vocab_size, tokenizer.mask_id)
    params = random_params(abstract_params(objective))
    return Gidd(objective.model, params, tokenizer, objective.process, row_mode="answers")


def test_an_answer_ends_with_its_first_end(tmp_path):
    tokenizer = answers_tokenizer(tmp_path / "tokenizer")
    end, begin = tokenizer.eos_id, tokenizer.bos_id
    ids = np.array([[begin, 1, 2, 3, end, 4, 5], [begin, 1, 2, 3, 4, 5, 6]], np.int32)
    drawn = np.ones(ids.shape, np.int32)
    samples = Samples(ids, ["", ""], -np.ones(ids.shape, np.float32), drawn, 3, np.array([3, 3]))
    found = answered(samples, ["w1", "w1 w2"], tokenizer, begin=True, alone=True)
    assert found.texts == ["w2 w3", "w3 w4 w5 w6"]
    assert found.ids[0].tolist() == [begin, 1, 2, 3, end, tokenizer.pad_id, tokenizer.pad_id]
    assert found.drawn_at.tolist() == [[1] * 5 + [0] * 2, [1] * 7]
    assert found.log_probs.sum() == -12
    whole = answered(samples, ["w1", "w1 w2"], tokenizer, begin=True, alone=False)
    assert whole.texts == ["w1 w2 w3", "w1 w2 w3 w4 w5 w6"]


def test_prompts_of_several_lengths_together_and_one_by_one(model):
    together, alone = (model.generate(prompts=PROMPTS, num_steps=6, batch_size=n) for n in (3, 1))
    assert together.texts == alone.texts
    np.testing.assert_array_equal(together.ids, alone.ids)
    for text, prompt in zip(together.texts, PROMPTS, strict=True):
        assert text.startswith(prompt)


def test_chat_asks_as_the_template_writes(model):
    ids = model.generate(prompts=["w1 w2"], chat=True, num_steps=4).ids[0]
    names = [model.tokenizer.backend.id_to_token(int(i)) for i in ids[:6]]
    assert names == ["<bos>", "<|user|>", "w1", "w2", "<eos>", "<|assistant|>"]
    messages = [{"role": "user", "content": "w1 w2"}]
    again = model.generate(prompts=[messages], chat=True, num_steps=4)
    np.testing.assert_array_equal(again.ids[0], ids)
    with pytest.raises(InputError, match="chat needs prompts"):
        model.generate(2, chat=True)


def test_a_row_without_an_answer_gives_no_nan(model, tmp_path):
    settings = settings_in(tmp_path, reversals(20, seed=0))
    objective = build_objective(settings, model.tokenizer.vocab_size, model.tokenizer.mask_id)
    tokens, mask = jnp.ones((2, 16), jnp.int32), jnp.ones((2, 16), bool)
    batch = {"tokens": tokens, "mask": mask, "given": mask}
    noised = objective.noise(jax.random.key(0), tokens, mask, mask)
    np.testing.assert_array_equal(noised.z_t, tokens)
    grads, metrics = loss_and_grads(objective, model.params, batch, noised, 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, metrics)))
    assert metrics["loss"] == 0


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_filling_counts_by_its_weight(tmp_path, weight):
    changes = {"train.padding_weight": weight}
    settings = settings_in(tmp_path, reversals(20, seed=0), **changes)
    objective = build_objective(settings, 36, 35)
    mask = jnp.array([[True, True, True, False]])
    given = jnp.array([[True, False, False, False]])
    np.testing.assert_array_equal(objective.loss_mask(mask, given), [[0, 1, 1, weight]])
    np.testing.assert_array_equal(objective.metric_mask(mask, given), [[0, 1, 1, 0]])


@pytest.mark.slow
def test_reversal_is_learnt_and_answered(tmp_path):
    """Held-out prompts of all lengths in one batch; the evaluation sees answers alone."""
    records = reversals(6000, seed=0)
    changes = {
        "model.hidden_size": 64,
        "train.num_steps": 2000,
        "train.batch_size": 64,
        "train.padding_weight": 0.2,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 1e-2,
        "optimizer.final_lr_ratio": 0.0,
    }
    figures = train(settings_in(tmp_path, records, **changes), tmp_path / "run")
    assert figures["nelbo"] < 0.25
    model = Gidd.from_pretrained(tmp_path / "run")
    asked = {record["prompt"]: record["answer"] for record in reversals(200, seed=1)}
    known = {record["prompt"] for record in records[:-8]}
    asked = {prompt: answer for prompt, answer in asked.items() if prompt not in known}
    found = model.generate(prompts=list(asked), num_steps=32, batch_size=64)
    right = [
        text == f"{prompt} {answer}"
        for text, (prompt, answer) in zip(found.texts, asked.items(), strict=True)
    ]
    print(f"{np.mean(right):.3f} of {len(right)} held-out prompts answered right")
    assert np.mean(right) > 0.9
    ((_, _, rows),) = open_corpora(
        model,
        str(tmp_path / "run"),
        None,
        "validation",
        max_documents=None,
        text_key=None,
        txt_documents=None,
    )
    assert rows.given is not None
    assert len(rows.ids) == 8
