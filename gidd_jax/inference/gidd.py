"""A trained model as one object: texts in, texts out.

from gidd_jax import Gidd
model = Gidd.from_pretrained("outputs/quickstart")
print(model.generate(num_samples=4, num_steps=64).texts[0])
print(model.generate(prompts=["It was"], method="psi", top_p=0.9).texts[0])
print(model.infill([["It was the best of ", 3, ", it was the worst of times"]]).texts[0])
print(model.correct(["It was the the best of times"]).texts[0])
print(model.suspicion(["It was the beast of times"]).wrong[0])
print(model.log_likelihood(["the best of times"], prompts=["It was"]).log_probs[0])
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from gidd_jax.data.rows import ANSWERS, NO_FRAME
from gidd_jax.data.tokenizer import Tokenizer
from gidd_jax.errors import InputError
from gidd_jax.inference import programs, scores
from gidd_jax.inference.answers import answered, conversations
from gidd_jax.inference.batches import by_batches, check_numbers, check_trace
from gidd_jax.inference.drawing import draw_rows
from gidd_jax.inference.framing import (
    decoded,
    framed,
    revised,
    trace_of,
    unframed,
)
from gidd_jax.inference.onward import continued, seed_of
from gidd_jax.inference.programs import Batch, special_ids
from gidd_jax.inference.prompts import (
    Piece,
    Rows,
    Text,
    by_width,
    check_some,
    empty_rows,
    infillings,
    scored_texts,
    whole_texts,
)
from gidd_jax.inference.samples import Corrected, Likelihoods, Samples, Suspicions
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.interchange.pretrained import Pretrained
from gidd_jax.interchange.save import save_pretrained
from gidd_jax.models.gidd import blocks_of
from gidd_jax.process import InterpolatingProcess
from gidd_jax.sampling.correction import Correction, check_correction
from gidd_jax.sampling.estimators import check_estimator, log_mean_exp
from gidd_jax.sampling.options import (
    CorrectionOptions,
    EstimatorOptions,
    SamplerOptions,
    SuspicionOptions,
    changed_options,
)
from gidd_jax.sampling.suspicion import check_suspicion
from gidd_jax.sampling.trace import changes_of_correction
from gidd_jax.training.objective import Network


@dataclasses.dataclass(frozen=True, eq=False)
class Gidd:
    """A network with its parameters, tokenizer and forward process (None: autoregressive)."""

    network: Network
    params: Any
    tokenizer: Tokenizer
    process: InterpolatingProcess | None
    keep_padding_columns: bool = False
    row_mode: str = "packed"  # how rows were framed in training, see `framing`

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        ema: bool = False,
        allow_code: bool = False,
        process: str | None = None,
        row_mode: str | None = None,
        dtype: str | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """Load a workdir or step of `gidd_jax.train`, a published folder, or a hub name.

        ema: the moving average of the parameters; allow_code, process: whose code may run where
        the model has a process of its own; row_mode: how training framed the rows of a published
        folder that does not say; dtype: "bfloat16" for half the memory; mesh: split the parameters
        of a published folder over it. Raises InputError when there is no model, or it is damaged
        (see `interchange.load`).
        """
        loaded = load_pretrained(
            path,
            ema=ema,
            allow_code=allow_code,
            process=process,
            row_mode=row_mode,
            dtype=dtype,
            mesh=mesh,
        )
        return cls(*loaded)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a new folder in the published Hugging Face format (see `interchange.save`).

        Raises InputError when it exists, or the process is one that the format cannot hold.
        """
        save_pretrained(Pretrained(*(getattr(self, name) for name in Pretrained._fields)), path)

    @property
    def max_seq_len(self) -> int:
        return self.network.max_seq_len

    def generate(
        self,
        num_samples: int | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        chat: bool = False,
        length: int | None = None,
        new_tokens: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        trace: bool = False,
        options: SamplerOptions | None = None,
        **changes: Any,
    ) -> Samples:
        """Draw `num_samples` sequences (default 4), or one continuation of each prompt.

        length: tokens of a sequence, prompt included (default: the context); new_tokens: how many
        to add to each prompt instead of filling the length, by blocks also beyond it (see
        `inference.onward`). `changes` are fields of `options`, such as num_steps=64. trace: return
        every change on the way, too (see `sampling.trace`). Prompts are texts or lists of ids.
        chat: they are messages of a user, or conversations (lists of {"role", "content"}) that the
        tokenizer's chat template writes; the texts are the answers. Of a model that was trained on
        answers a sample ends with the token that ends the answer. Batches are split over the local
        devices; a sample depends on the seed, its number and its prompt, not on the batch. Raises
        InputError for options outside their range, and prompts that do not fit.
        """
        options = changed_options(options or SamplerOptions(), changes)
        goes_on = length is None and not trace  # beyond the context, if it is asked to
        length = self.max_seq_len if length is None else length
        if not 1 <= length <= self.max_seq_len:
            raise InputError(f"length must lie in [1, {self.max_seq_len}], the context: {length}")
        if new_tokens is not None and (prompts is None or new_tokens < 1):
            raise InputError(f"new_tokens must be at least 1, and needs prompts: {new_tokens}")
        if chat and prompts is None:
            raise InputError("chat needs prompts: give the messages to answer")
        if prompts is not None and num_samples is not None:
            raise InputError("give num_samples or prompts: each prompt gets one continuation")
        if prompts is None:
            count = 4 if num_samples is None else num_samples
            if count < 1:
                raise InputError(f"num_samples must be at least 1: {count}")
            rows = empty_rows(self.tokenizer, count, length, begin=self.process is None)
            return draw_rows(self, batch_size, seed, options, trace, rows)
        check_some(prompts, "prompts")
        if chat:
            prompts = conversations(self.tokenizer, prompts)
        samples = continued(
            lambda rows, window: draw_rows(
                self, batch_size, seed_of(seed, window), options, trace, rows
            ),
            self.tokenizer,
            prompts,
            length,
            new_tokens,
            begin=self.begins,
            end_id=self.tokenizer.eos_id if options.stop_at_end else None,
            block_length=(options.block_length or blocks_of(self.network)) if goes_on else 0,
        )
        if not chat and self.row_mode != ANSWERS:
            return samples
        return answered(samples, prompts, self.tokenizer, begin=self.begins, alone=chat)

    def infill(
        self,
        texts: Sequence[Sequence[Piece]] | np.ndarray,
        *,
        batch_size: int = 16,
        seed: int = 0,
        trace: bool = False,
        options: SamplerOptions | None = None,
        **changes: Any,
    ) -> Samples:
        """Fill gaps in texts: each is a list of pieces, texts and numbers of tokens to generate.

        texts: also token ids int [N, L], -1 where one is to be generated. Other arguments as in
        `generate`. Raises InputError for autoregressive models, and for texts without gaps or
        longer than the context.
        """
        if self.process is None:
            raise InputError("infilling needs a diffusion model: this one is autoregressive")
        check_some(texts, "texts")
        rows = infillings(self.tokenizer, texts, self.max_seq_len, begin=self.begins)
        options = changed_options(options or SamplerOptions(), changes)
        return draw_rows(self, batch_size, seed, options, trace, rows)

    def correct(
        self,
        texts: Sequence[str] | np.ndarray | Rows,
        *,
        batch_size: int = 16,
        seed: int = 0,
        ends: bool = True,
        trace: bool = False,
        options: CorrectionOptions | None = None,
        **changes: Any,
    ) -> Corrected:
        """Improve texts, token ids int [N, L] or the free tokens of rows by `sampling.correction`.

        `changes` are fields of `options`, such as temperature=0.2; ends as in `suspicion`, trace as
        in `generate`. Raises InputError for autoregressive models, for score "suspicion" with masks
        alone, and for texts that are empty or longer than the context.
        """
        if self.process is None:
            raise InputError("self-correction needs a diffusion model: this one is autoregressive")
        check_some(texts, "texts")
        settings = changed_options(options or CorrectionOptions(), changes)
        check_correction(self.process, settings)
        if isinstance(texts, Rows):
            rows = texts
        else:
            rows = whole_texts(self.tokenizer, texts, self.max_seq_len, begin=self.begins)
        check_trace(trace)
        traced = []

        def corrected(batch: Batch) -> Correction:
            part = programs.correct(
                batch, network=self.network, process=self.process, options=settings, trace=trace
            )
            if trace:
                traced.append(changes_of_correction(part))
            return part._replace(frames=None)

        whole_rows = self.framed_rows(rows, ends=ends)
        parts = by_batches(corrected, self.params, whole_rows, batch_size, seed)
        calls = sum(int(np.max(part.num_steps)) for part in parts)
        result = jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(rows.ids)], *parts)
        check_numbers(result.initial_accuracy, result.final_accuracy)
        ids = unframed(result.ids, rows, self.tokenizer)
        texts_out = revised(texts, rows, ids, self.tokenizer)
        fields = result._asdict() | {"ids": ids, "texts": texts_out, "network_calls": calls}
        del fields["frames"]
        if trace:
            fields["trace"] = trace_of(
                traced, rows, np.ones(rows.ids.shape, bool), texts_out, self.tokenizer
            )
        return Corrected(**fields)

    def suspicion(
        self,
        texts: Sequence[Text] | Rows,
        *,
        batch_size: int = 16,
        ends: bool = True,
        options: SuspicionOptions | None = None,
        **changes: Any,
    ) -> Suspicions:
        """Return how probably each token of the texts is wrong, and what belongs there instead.

        texts: also lists of token ids, or rows whose free tokens are judged. ends: texts shorter
        than the context end there; False: they hold what ends them, if anything. `changes` are
        fields of `options`, such as method="leave_one_out". Raises InputError for autoregressive
        models, for method "one_pass" with masks alone, and for texts that are empty or too long.
        """
        if self.process is None:
            raise InputError("suspicion needs a diffusion model: this one is autoregressive")
        check_some(texts, "texts")
        settings = changed_options(options or SuspicionOptions(), changes)
        check_suspicion(self.process, settings)
        given = isinstance(texts, Rows)
        rows = texts if given else self._scored(texts, None)
        whole_rows = self.framed_rows(rows, ends=ends)
        found, calls = scores.suspicion(self, whole_rows, settings, batch_size)
        check_numbers(found[0])
        texts_out = decoded(rows.ids, rows, self.tokenizer)
        if not given:
            pairs = zip(texts, texts_out, strict=True)
            texts_out = [text if isinstance(text, str) else found for text, found in pairs]
        found = [leaf[:, : rows.ids.shape[1]] for leaf in found]
        return Suspicions(rows.ids, texts_out, rows.free, *found, network_calls=calls)

    def log_likelihood(
        self,
        texts: Sequence[Text],
        *,
        prompts: Sequence[Text] | None = None,
        batch_size: int = 16,
        seed: int = 0,
        options: EstimatorOptions | None = None,
        **changes: Any,
    ) -> Likelihoods:
        """Return log p of each text (or list of token ids) given its prompt, in nats.

        Exact for autoregressive models; for diffusion the lower bound that the options choose, by
        default the diffusion bound of filling in the text beside the prompt (see
        `sampling.estimators`). `changes` are fields of `options`, such as num_samples_t=32 or
        estimator="importance". A value depends on the seed and the text's number, not on the
        batch. Raises InputError for texts that are empty or, with their prompt and the token that
        begins it, longer than the context, and for estimators that the process does not have.
        """
        check_some(texts, "texts")
        settings = changed_options(options or EstimatorOptions(), changes)
        check_estimator(self.process, settings)
        rows = self._scored(texts, prompts)
        by_token, calls = scores.log_likelihood_draws(
            self, self.framed_rows(rows), settings, batch_size, seed
        )
        check_numbers(by_token)
        draws = by_token.sum(axis=-1, dtype=np.float64)
        mean = by_token[..., : rows.ids.shape[1]].mean(axis=0)
        return Likelihoods(rows.ids, log_mean_exp(draws), mean, rows.free.sum(axis=-1), calls)

    def is_greedy(
        self,
        texts: Sequence[Text],
        *,
        prompts: Sequence[Text] | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Return whether temperature 0 generates each text after its prompt, bool [N].

        From left to right, or for diffusion from masks on with method "confidence" and one step a
        token. Raises InputError like `log_likelihood`, and for diffusion without such a start.
        """
        check_some(texts, "texts")
        rows = self._scored(texts, prompts)
        found = np.zeros(len(rows.ids), bool)
        for numbers, part in by_width(self.framed_rows(rows)):
            run = functools.partial(
                programs.is_greedy,
                network=self.network,
                process=self.process,
                special=special_ids(self.tokenizer, self.network, is_framed=self.begins),
            )
            parts = by_batches(run, self.params, part, batch_size, seed=0)
            check_numbers(*(np.where(part.is_broken, np.nan, 0.0) for part in parts))
            found[numbers] = np.concatenate([part.matches for part in parts])[: len(numbers)]
        return found

    @property
    def begins(self) -> bool:
        """Whether rows begin with a token of the frame."""
        return self.row_mode != NO_FRAME

    def _scored(self, texts: Sequence[Text], prompts: Sequence[Text] | None) -> Rows:
        return scored_texts(self.tokenizer, texts, prompts, self.max_seq_len, begin=self.begins)

    def framed_rows(self, rows: Rows, *, ends: bool = True) -> Rows:
        """Return the rows as the network was trained on them (see `framing.framed`)."""
        if self.process is None:  # no token sees those after it
            return rows
        return framed(rows, self.tokenizer, self.row_mode, self.max_seq_len, ends=ends)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of one sequence of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
