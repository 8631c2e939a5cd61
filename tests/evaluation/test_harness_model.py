"""The adapter for lm-evaluation-harness, in its own evaluator, on tasks of a few lines."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from gidd_jax import Gidd
from gidd_jax.errors import InputError

pytest.importorskip("lm_eval")
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from gidd_jax.evaluation.harness_model import HarnessModel

DOCS = [
    {"question": "It is ", "choices": ["a truth", "men"], "answer": 0, "text": "a single man"},
    {"question": "In want", "choices": [" of", " wife", " he"], "answer": 2, "text": "b" * 60},
]
CONTEXT = 24
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "tiny_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["~~"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints gidd and ar, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    for name in ("gidd", "ar"):
        write_checkpoint(folder / name, folder, name, **{"model.max_seq_len": CONTEXT})
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    shots = folder / "shots.jsonl"
    shots.write_text("".join(json.dumps(DOCS[i % 2]) + "\n" for i in range(60)))
    (folder / "tasks").mkdir()
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\nfewshot_split: train\n"
        splits = f"{{test: {data}, train: {shots}}}"
        files = f"dataset_kwargs: {{data_files: {splits}, cache_dir: {folder / 'cache'}}}"
        (folder / "tasks" / f"{name}.yaml").write_text(head + files + body)
    return folder


@pytest.fixture(scope="module")
def harness_models(folder) -> dict[str, HarnessModel]:
    return {name: HarnessModel(str(folder / name), num_samples_t=2) for name in ("gidd", "ar")}


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i)  # type: ignore[arg-type]
        for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("name", ["gidd", "ar"])
def test_tasks_run_in_the_harness_and_agree_with_the_python_api(folder, harness_models, name):
    lm = harness_models[name]
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        bootstrap_iters=0,
        gen_kwargs={"num_steps": 2} if name == "gidd" else None,
    )
    assert results is not None
    samples, figures = results["samples"], results["results"]
    model, score = lm.model, {"num_samples_t": 2}
    # the prompt's last blank goes to the choice, as the harness does it
    prompts = ["It is"] * 2 + ["In want"] * 3
    choices = [" a truth", " men", *DOCS[1]["choices"]]
    expected = model.log_likelihood(choices, prompts=prompts, **score).log_probs
    greedy = model.is_greedy(choices, prompts=prompts)
    pairs = [pair for sample in samples["tiny_choice"] for pair in sample["filtered_resps"]]
    np.testing.assert_allclose([float(value) for value, _ in pairs], expected, rtol=1e-4)
    assert [str(flag) == "True" for _, flag in pairs] == greedy.tolist()
    right = (expected[:2].argmax() == 0) + (expected[2:].argmax() == 2)
    assert figures["tiny_choice"]["acc,none"] == right / 2

    nats = sum(float(np.ravel(s["filtered_resps"])[0]) for s in samples["tiny_rolling"])
    size = sum(len(doc["text"]) for doc in DOCS)
    perplexity = figures["tiny_rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-nats / size), rel=1e-5)

    options = {} if name == "ar" else {"num_steps": 2}
    made = model.generate(
        prompts=[doc["question"] for doc in DOCS], new_tokens=6, temperature=0.0, **options
    )
    for sample, doc, text in zip(samples["tiny_words"], DOCS, made.texts, strict=True):
        assert text.startswith(doc["question"] + sample["filtered_resps"][0])


@pytest.mark.parametrize(
    "chosen",
    [
        {"estimator": "chain", "chain_order": "left_to_right", "num_orders": 1},
        {"estimator": "importance", "num_paths": 3, "path_steps": 2},
    ],
    ids=lambda chosen: chosen["estimator"],
)
def test_the_estimator_that_was_chosen_is_that_of_the_python_api(folder, harness_models, chosen):
    lm = HarnessModel(str(folder / "gidd"), **chosen)
    pairs = lm.loglikelihood(requests("loglikelihood", ("It is", " a truth"), ("In want", " of")))
    prompts, texts = ["It is", "In want"], [" a truth", " of"]
    want = lm.model.log_likelihood(texts, prompts=prompts, **chosen).log_probs
    np.testing.assert_allclose([value for value, _ in pairs], want, rtol=1e-4)
    bound = harness_models["gidd"].model.log_likelihood(texts, prompts=prompts, num_samples_t=2)
    assert np.all(abs(want - bound.log_probs) > 1e-3)


def test_the_command_finds_the_model(folder):
    args = ["--model", "gidd_jax", "--tasks", "tiny_choice", "--include_path", folder / "tasks"]
    args += ["--batch_size", "4", "--model_args"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def run(model_args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "gidd_jax.harness", *map(str, args), model_args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    done = run(f"checkpoint={folder / 'ar'},seed=3")
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout
    wrong = run(f"checkpoint={folder / 'none'}")
    assert wrong.returncode == 2, wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith("error: ")


def test_long_documents_are_scored_once_a_token_in_windows_of_the_context(harness_models):
    """Exact for the autoregressive model: each window by hand."""
    lm = harness_models["ar"]
    text = "It is a truth universally acknowledged, that a single man"
    ids, size = lm.model.tokenizer.encode([text])[0], CONTEXT - 2
    prompts, texts = [[]], [ids[:size]]
    prompts.append(ids[size - 1 : size])
    texts.append(ids[size : 2 * size])
    rest = len(ids) - 2 * size
    prompts.append(ids[len(ids) - size - 1 : len(ids) - rest])
    texts.append(ids[len(ids) - rest :])
    expected = lm.model.log_likelihood(texts, prompts=prompts).log_probs.sum()
    asked = requests("loglikelihood_rolling", (text,), ("",), ("ab",))
    got = lm.loglikelihood_rolling(asked)
    assert got[0] == pytest.approx(expected, rel=1e-5)
    assert got[1] == 0.0
    assert got[2] == pytest.approx(lm.model.log_likelihood(["ab"]).log_probs[0], rel=1e-5)


def test_long_contexts_lose_their_beginning_and_none_is_the_begin_token(harness_models):
    lm = harness_models["ar"]
    got = lm.loglikelihood(requests("loglikelihood", ("x" * 9 + "y" * 40, "abc"), ("", "abc")))
    expected = lm.model.log_likelihood(["abc"] * 2, prompts=["y" * (CONTEXT - 4), ""]).log_probs
    np.testing.assert_allclose([value for value, _ in got], expected, rtol=1e-5)


def generated(lm: HarnessModel, context: str, **gen_kwargs: object) -> str:
    return lm.generate_until(requests("generate_until", (context, gen_kwargs)))[0]


def test_generation_stops_at_stop_strings_and_reads_its_options(harness_models):
    lm = harness_models["ar"]
    whole = generated(lm, "It is", max_gen_toks=12)
    made = lm.model.generate(prompts=["It is"], new_tokens=12, temperature=0.0)
    assert made.texts[0] == "It is" + whole
    assert len(set(whole)) > 1
    stop = next(char for char in whole if char != whole[0])
    assert generated(lm, "It is", max_gen_toks=12, until=["%%%", stop]) == whole.split(stop)[0]
    hot = generated(lm, "It is", max_gen_toks=12, do_sample=True, temperature=5.0)
    made = lm.model.generate(prompts=["It is"], new_tokens=12, temperature=5.0)
    assert made.texts[0] == "It is" + hot != "It is" + whole
    # several groups of options, in the order of the requests
    mixed = lm.generate_until(
        requests(
            "generate_until",
            ("It is", {"max_gen_toks": 12}),
            ("It is", {"max_gen_toks": 12, "until": [stop]}),
            ("a" * 50 + "It is", {"max_gen_toks": CONTEXT - 1 - 5}),
        )
    )
    assert mixed[:2] == [whole, whole.split(stop)[0]]
    assert mixed[2].startswith(whole)


def test_a_chat_template_is_refused(folder, harness_models):
    with pytest.raises(InputError, match="--apply_chat_template needs a model of conversations"):
        lm_eval.simple_evaluate(
            model=harness_models["ar"],
            tasks=["tiny_choice"],
            task_manager=TaskManager(include_path=str(folder / "tasks")),
            apply_chat_template=True,
        )


def test_fifty_shots_leave_the_question_and_the_last_of_them(folder, harness_models):
    """The context of a task with more examples than fit loses its beginning, as by hand."""
    lm = harness_models["ar"]
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["tiny_choice", "tiny_words"],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        num_fewshot=50,
        bootstrap_iters=0,
    )
    assert results is not None
    for sample in results["samples"]["tiny_choice"]:
        for (context, choice), (value, _) in zip(
            sample["arguments"], sample["filtered_resps"], strict=True
        ):
            assert len(context) > 50 * len("It is men")
            stem = context.rstrip()  # its last blank goes to the choice, as the harness does it
            text = context[len(stem) :] + choice
            prompt = stem[len(text) + 1 - CONTEXT :]
            expected = lm.model.log_likelihood([text], prompts=[prompt]).log_probs[0]
            assert float(value) == pytest.approx(expected, rel=1e-4)
    for sample, doc in zip(results["samples"]["tiny_words"], DOCS, strict=True):
        (arguments,) = sample["arguments"]
        assert arguments[0].endswith(doc["question"])
        prompt = arguments[0][-(CONTEXT - 1 - 6) :]
        made = lm.model.generate(prompts=[prompt], new_tokens=6, temperature=0.0)
        assert made.texts[0] == prompt + sample["filtered_resps"][0]


def test_a_text_ends_at_its_end_token(harness_models, monkeypatch):
    lm = harness_models["gidd"]
    made = Gidd.generate(lm.model, prompts=["It is"], new_tokens=8, temperature=0.0, num_steps=2)
    ids = np.concatenate([made.ids[:, :9], [[lm.eot_token_id]], made.ids[:, 10:]], axis=1)
    monkeypatch.setattr(Gidd, "generate", lambda self, **_: made._replace(ids=ids))
    text = generated(lm, "It is", max_gen_toks=8, num_steps=2)
    assert text == lm.model.decode(ids[0, 6:9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: HarnessModel(), "checkpoint is required: --model_args checkpoint=RUN"),
        *(
            (
                lambda path, size=size: HarnessModel(path, batch_size=size),
                f"batch_size must be a number of at least 1, such as --batch_size 16: {size}$",
            )
            for size in ("auto", "auto:4", "0", 0, "-1")
        ),
        (lambda path: HarnessModel(path, num_step=2), "unknown model_args num_step: did you mean"),
        (lambda path: HarnessModel(path, temperature=1.0), "temperature belongs to --gen_kwargs"),
        (lambda path: HarnessModel(path, method="x"), "unknown method 'x'"),
        (
            lambda path: generated(HarnessModel(path), "a", num_beams=4),
            "unknown gen_kwargs num_beams: did you mean num_steps",
        ),
        (
            lambda path: generated(HarnessModel(path), "a", max_gen_toks=23),
            "max_gen_toks=23 leaves no room for a prompt in the context of 24 tokens",
        ),
    ],
)
def test_bad_input_is_refused(folder, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(str(folder / "ar"))
    assert "\n" not in str(error.value)
