"""A trained model behind the interface of EleutherAI's lm-evaluation-harness (lm_eval).

`gidd_jax.harness` runs it from the command line. From Python:

import lm_eval
from gidd_jax.evaluation.harness_model import HarnessModel
results = lm_eval.simple_evaluate(model=HarnessModel("RUN", batch_size=32), tasks=["piqa"])
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from gidd_jax.cli import nearest
from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.inference.prompts import begin_id, end_id
from gidd_jax.sampling.estimators import check_estimator
from gidd_jax.sampling.options import EstimatorOptions, SamplerOptions, changed_options

TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


class HarnessModel(TemplateLM):
    """A checkpoint of GIDD, MDLM or the autoregressive baseline, for tasks of the harness.

    Log-likelihoods are exact for autoregressive models. For diffusion they are estimates of lower
    bounds: perplexities from them are upper bounds, and choices are ranked by their bounds.
    """

    def __init__(
        self,
        checkpoint: str = "",
        *,
        ema: bool = False,
        allow_code: bool = False,
        process: str | None = None,
        batch_size: int | str = 16,
        seed: int = 0,
        check_greedy: bool = True,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        """Load a model; `options` are those of the sampler, but for what gen_kwargs set.

        Fields of EstimatorOptions, such as num_samples_t (32 here) and estimator, choose what is
        returned as the log-likelihood of a diffusion model. check_greedy: whether to answer
        `is_greedy` (False: say no to all, which is faster for tasks that do not ask). device and
        max_batch_size, which the harness always passes, have no effect. Raises InputError.
        """
        super().__init__()
        del device, max_batch_size  # jax takes what is there
        if not checkpoint:
            raise InputError("checkpoint is required: --model_args checkpoint=RUN")
        if "temperature" in options:
            raise InputError("temperature belongs to --gen_kwargs: tasks set it, 0 by default")
        own = (
            "checkpoint",
            "ema",
            "allow_code",
            "process",
            "seed",
            "check_greedy",
            *(field.name for field in dataclasses.fields(EstimatorOptions)),
        )
        chosen = {name: options.pop(name) for name in own if name in options}
        _sampler_options(options, "model_args", own)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(
                f"batch_size must be a number of at least 1, such as --batch_size 16: {batch_size}"
            )
        self.batch_size = int(batch_size)
        self.model = Gidd.from_pretrained(
            str(checkpoint), ema=ema, allow_code=allow_code, process=process
        )
        end_id(self.model.tokenizer)  # tasks have texts of any length
        if chosen.get("estimator", "bound") == "bound":
            chosen.setdefault("num_samples_t", 32)
        self.estimator = changed_options(EstimatorOptions(), chosen)
        check_estimator(self.model.process, self.estimator)
        self.seed, self.check_greedy = seed, check_greedy
        self.options = options

    @property
    def max_length(self) -> int:
        """Tokens of the context, with the one that begins a text."""
        return self.model.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return end_id(self.model.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        return begin_id(self.model.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Raise InputError: the harness asks for the name of a chat template's tokenizer alone."""
        raise InputError(
            "--apply_chat_template needs a model of conversations, and these continue texts: leave "
            "it out"
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text; what begins a text is put there when it is scored."""
        del add_special_tokens, kwargs
        return self.model.tokenizer.encode([string])[0].tolist()

    def _loglikelihood_tokens(
        self, requests: list[TokenPair], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return (log p of the continuation, whether temperature 0 generates it) of each request.

        Contexts that are too long lose their beginning. `is_greedy` decodes from left to right, or
        for diffusion the most certain token first (see `Gidd.is_greedy`).
        """
        del kwargs
        if not requests:
            return []
        prompts, texts = self._prompts_and_texts([request[1:] for request in requests])
        scores = self._log_probs(prompts, texts)
        greedy = np.zeros(len(texts), bool)
        if self.check_greedy:
            greedy = self.model.is_greedy(texts, prompts=prompts, batch_size=self.batch_size)
        return list(zip(scores.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of each whole text, a bound for diffusion, in windows of the context.

        Every token is scored once; windows after the first know the token before them, and the
        last one as much as fits.
        """
        del disable_tqdm
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # of a row the token that begins a text takes one place, and the context one
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(number)
        totals = np.zeros(len(requests))
        if pairs:
            np.add.at(totals, owners, self._log_probs(*self._prompts_and_texts(pairs)))
        return totals.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to a stop string or the token that ends texts.

        gen_kwargs: until, max_gen_toks, do_sample and the options of the sampler; temperature is 0
        unless it or do_sample is set. Raises InputError for others.
        """
        del disable_tqdm
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for key, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(
                numbers, self._generate(contexts, json.loads(key)), strict=True
            ):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], gen_kwargs: dict[str, Any]) -> list[str]:
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, min(256, self.max_length // 2)))
        until, count = kwargs.pop("until", []), kwargs.pop("max_gen_toks")
        if not kwargs.pop("do_sample"):
            kwargs["temperature"] = 0.0
        options = _sampler_options(self.options | kwargs, "gen_kwargs", ("until", "max_gen_toks"))
        room = self.max_length - 1 - count
        if room < 1:
            raise InputError(
                f"max_gen_toks={count} leaves no room for a prompt in the context of "
                f"{self.max_length} tokens: set --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
        prompts = [ids[-room:] for ids in self.model.tokenizer.encode(contexts)]
        drawn = self.model.generate(
            prompts=prompts,
            new_tokens=count,
            batch_size=self.batch_size,
            seed=self.seed,
            options=options,
        )
        texts = []
        for prompt, row in zip(prompts, drawn.ids, strict=True):
            new = row[1 + len(prompt) :][:count]
            end = np.flatnonzero(new == self.eot_token_id)
            text = self.model.decode(new[: end[0]] if end.size else new)
            texts.append(postprocess_generated_text(text, until, think_end_token=None))
        return texts

    def _prompts_and_texts(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Cut contexts from the left to what fits, without the token that begins a text."""
        prompts, texts = [], []
        for context, continuation in pairs:
            if context[:1] == [self.prefix_token_id]:
                context = context[1:]
            room = max(0, self.max_length - 1 - len(continuation))
            prompts.append(context[max(0, len(context) - room) :])
            texts.append(continuation)
        return prompts, texts

    def _log_probs(self, prompts: list[list[int]], texts: list[list[int]]) -> np.ndarray:
        return self.model.log_likelihood(
            texts,
            prompts=prompts,
            options=self.estimator,
            batch_size=self.batch_size,
            seed=self.seed,
        ).log_probs


def _sampler_options(given: dict[str, Any], where: str, others: Sequence[str]) -> SamplerOptions:
    legal = [field.name for field in dataclasses.fields(SamplerOptions)]
    for name in given:
        if name not in legal:
            raise InputError(f"unknown {where} {name}: {nearest(name, [*legal, *others])}")
    return SamplerOptions(**given)
