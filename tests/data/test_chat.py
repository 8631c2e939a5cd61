"""Conversations by a chat template: transformers' own text, and what is refused."""

import pytest
from answer_files import TEMPLATE, answers_tokenizer

from gidd_jax.data.chat import Conversations
from gidd_jax.data.tokenizer import load_tokenizer
from gidd_jax.errors import InputError

MESSAGES = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
]


def test_the_ids_are_those_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = answers_tokenizer(tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    wanted = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert Conversations(tokenizer).prompt_ids(MESSAGES, "prompt 1").tolist() == wanted
    text = "<|user|> w1 w2 <eos> <|assistant|> w3 <eos> <|user|> w4 <eos> <|assistant|>"
    assert theirs.decode(wanted) == text


def test_a_template_that_writes_the_begin_writes_it_once(tmp_path):
    tokenizer = answers_tokenizer(tmp_path / "tokenizer", template="{{ bos_token }} " + TEMPLATE)
    plain = answers_tokenizer(tmp_path / "plain")
    found, wanted = (Conversations(t).prompt_ids(MESSAGES, "a") for t in (tokenizer, plain))
    assert found.tolist() == wanted.tolist()


def test_a_template_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = answers_tokenizer(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.chat_template == TEMPLATE
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (MESSAGES, None, "has no chat template: give records of prompt and answer"),
        (MESSAGES, "{{ raise_exception('no system') }}", "refuses it: no system"),
        (MESSAGES, "{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        (MESSAGES, "{% for %}", "refuses it: "),
        (
            [{"role": "user", "content": "w1 <eos> w2"}],
            TEMPLATE,
            "spells the special token '<eos>'",
        ),
        ([{"role": "user"}], TEMPLATE, "message 1 has no role and content that are texts"),
        ([], TEMPLATE, "no message before the answer"),
    ],
)
def test_what_cannot_be_written_is_one_line(messages, template, message, tmp_path):
    tokenizer = answers_tokenizer(tmp_path / "tokenizer", template=template)
    with pytest.raises(InputError) as caught:
        Conversations(tokenizer).prompt_ids(messages, "prompt 3")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
