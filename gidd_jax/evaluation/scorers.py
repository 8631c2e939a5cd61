"""Models that score the texts of others: Llamas in JAX, any causal LM through PyTorch."""

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gidd_jax.data.tokenizer import Tokenizer, load_tokenizer
from gidd_jax.errors import InputError, first_line
from gidd_jax.interchange.load import load_pretrained
from gidd_jax.loss import at_ids
from gidd_jax.models.llama import Llama
from gidd_jax.parallel.sharding import activate, batch_sharding, local_mesh, replicated

_LENGTH_STEP = 64  # padded lengths are multiples of it, so that few programs are compiled


class Scorer(Protocol):
    """A causal language model with its tokenizer, and the most tokens it takes.

    `pad_id` is a token of the model. Its methods take right-padded ids int32 [B, L] and their
    lengths int32 [B].
    """

    tokenizer: Tokenizer
    max_length: int
    pad_id: int
    backend: str

    def score(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return -log p of each token given those before it, in nats, and whether it was the most
        probable: float32 and bool [B, L - 1]."""
        ...

    def features(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the last hidden state of each row's last token, float32 [B, hidden_size]."""
        ...


class SampleScores(NamedTuple):
    """Per sample [N]: nats, number of scored tokens, and how many were the scorer's first choice;
    token_nats [sum of tokens] holds the summands."""

    nats: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray
    token_nats: np.ndarray


def load_scorer(name: str, backend: str = "auto", dtype: str = "float32") -> Scorer:
    """Load a scorer: a Hugging Face folder or hub name, or a workdir of an autoregressive run.

    backend: 'jax' for Llamas, 'torch' for any causal language model of transformers; 'auto' takes
    JAX for local Llamas and runs. dtype: of the matrix products. Raises InputError when there is
    no such model, or PyTorch is needed and missing.
    """
    if backend == "auto":
        backend = "jax" if _is_for_jax(name) else "torch"
    return JaxScorer(name, dtype) if backend == "jax" else TorchScorer(name, dtype)


def _is_for_jax(name: str) -> bool:
    folder = Path(name).expanduser()
    if not folder.is_dir():  # on the hub: only PyTorch takes every architecture
        return importlib.util.find_spec("torch") is None
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type", "llama")
    except (OSError, ValueError, AttributeError, RecursionError):
        kind = "llama"  # a workdir or damaged: the loader says more
    return kind == "llama"


class JaxScorer:
    """A Llama in JAX, its batches split over the local devices."""

    backend = "jax"

    def __init__(self, name: str, dtype: str):
        model = load_pretrained(name, causal=True)
        assert isinstance(model.network, Llama)
        self.tokenizer, self.pad_id = model.tokenizer, model.tokenizer.pad_id
        self.max_length = model.network.max_seq_len
        self._network = model.network.clone(dtype=jnp.dtype(dtype))
        self._mesh = local_mesh()
        self._params = jax.device_put(model.params, replicated(self._mesh))

    def score(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        del lengths  # padding comes last: no token before it sees it
        nll, correct = self._run(_score, ids)
        return nll[: len(ids), : ids.shape[1] - 1], correct[: len(ids), : ids.shape[1] - 1]

    def features(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        hidden = self._run(_features, ids)
        return hidden[np.arange(len(ids)), lengths - 1]

    def _run(self, function: Any, ids: np.ndarray) -> Any:
        """Call it on ids filled up to whole steps of length and rows on every device."""
        rows = -len(ids) % self._mesh.size
        columns = min(-ids.shape[1] % _LENGTH_STEP, self.max_length - ids.shape[1])
        ids = np.pad(ids, ((0, rows), (0, columns)), constant_values=self.pad_id)
        ids = jax.device_put(ids, batch_sharding(self._mesh))
        # The default precision of float32 products on TPUs is that of bfloat16.
        with activate(self._mesh), jax.default_matmul_precision("highest"):
            return jax.tree.map(np.asarray, function(self._params, ids, network=self._network))


@functools.partial(jax.jit, static_argnames="network")
def _score(params: Any, ids: jax.Array, *, network: Any) -> tuple[jax.Array, jax.Array]:
    h = network.apply({"params": params}, ids, method="features")

    def position(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, targets = inputs  # [B, D] and [B]
        logits = network.apply({"params": params}, h, method="project")
        nll = -at_ids(jax.nn.log_softmax(logits), targets)
        return nll, jnp.argmax(logits, axis=-1) == targets

    # Some positions at a time: the tensor of all logits, [B, L, vocabulary], might not fit.
    by_position = jnp.swapaxes(h[:, :-1], 0, 1), jnp.swapaxes(ids[:, 1:], 0, 1)
    nll, correct = jax.lax.map(position, by_position, batch_size=_LENGTH_STEP)
    return jnp.swapaxes(nll, 0, 1), jnp.swapaxes(correct, 0, 1)


@functools.partial(jax.jit, static_argnames="network")
def _features(params: Any, ids: jax.Array, *, network: Any) -> jax.Array:
    return network.apply({"params": params}, ids, method="features").astype(jnp.float32)


class TorchScorer:
    """A causal language model of transformers, on the GPU where PyTorch has one."""

    backend = "torch"

    def __init__(self, name: str, dtype: str):
        if importlib.util.find_spec("torch") is None:
            raise InputError(
                f"scorer {name!r} needs PyTorch, which is not installed: "
                "pip install 'gidd-jax[eval]', or give the folder of a Llama"
            )
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(name)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, dtype), trust_remote_code=False
            )
        except Exception as error:  # whatever transformers or the hub client raise
            raise InputError(
                f"scorer {name!r} is no causal language model of transformers: {first_line(error)}"
            ) from error
        for key, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise InputError(
                    f"scorer {name!r} is damaged ({key} holds NaN or infinities): fetch it again"
                )
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self.max_length = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        num_ids = model.get_input_embeddings().num_embeddings
        # The tokenizer may have been given a pad token that the model lacks.
        pad_id, eos_id = self.tokenizer.pad_id, self.tokenizer.eos_id
        self.pad_id = pad_id if pad_id < num_ids or eos_id is None else eos_id

    def score(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        output = self._run(ids, lengths)
        logits = output.logits[:, :-1].float()
        targets = self._torch.tensor(ids[:, 1:], device=self._device).long()
        nll = self._torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        correct = logits.argmax(-1) == targets
        return nll.view(targets.shape).cpu().numpy(), correct.cpu().numpy()

    def features(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        hidden = self._run(ids, lengths, output_hidden_states=True).hidden_states[-1]
        return hidden.float().cpu().numpy()[np.arange(len(ids)), lengths - 1]

    def _run(self, ids: np.ndarray, lengths: np.ndarray, **options: bool) -> Any:
        attended = np.arange(ids.shape[1])[None] < lengths[:, None]
        with self._torch.inference_mode():
            return self._model(
                input_ids=self._torch.tensor(ids, device=self._device).long(),
                attention_mask=self._torch.tensor(attended, device=self._device).long(),
                use_cache=False,
                **options,
            )


def encode(scorer: Scorer, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
    """Return the ids of each text as the scorer expects them, int32 [at most max_length].

    With the tokens that its tokenizer puts around a text, such as Llama's BOS.
    """
    return [ids[:max_length] for ids in scorer.tokenizer.encode(texts, with_ends=True)]


def score_sequences(
    scorer: Scorer,
    sequences: Sequence[np.ndarray],
    *,
    batch_size: int,
    align_mask_to_input: bool = False,
) -> SampleScores:
    """Score every token of each sequence [L] but the first, in batches padded on the right.

    align_mask_to_input: count what the original counts, the padding token after each sequence
    that is shorter than the longest of its batch too. Raises InputError when a score is no number.
    """
    parts = []
    for ids, lengths in _batches(scorer, sequences, batch_size, "Scoring samples"):
        nll, correct = scorer.score(ids, lengths)
        last = lengths if align_mask_to_input else lengths - 1
        counted = np.arange(nll.shape[1])[None] < last[:, None]
        if not np.isfinite(nll[counted]).all():
            raise InputError(
                "the scorer's output is not a number: its weights are damaged, or its dtype has "
                "too small a range, use float32"
            )
        nats = np.where(counted, nll, 0.0).sum(axis=1, dtype=np.float64)
        parts.append((nats, counted.sum(1), (counted & correct).sum(1), nll[counted]))
    return SampleScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def sequence_features(
    scorer: Scorer, sequences: Sequence[np.ndarray], *, batch_size: int
) -> np.ndarray:
    """Return the last hidden state at the end of each sequence, float32 [N, hidden_size]."""
    batches = _batches(scorer, sequences, batch_size, "Reading features")
    return np.concatenate([scorer.features(ids, lengths) for ids, lengths in batches])


def _batches(scorer: Scorer, sequences: Sequence[np.ndarray], batch_size: int, label: str) -> Any:
    starts = range(0, len(sequences), batch_size)
    for start in tqdm(starts, label, disable=None, unit="batch", leave=False):
        batch = sequences[start : start + batch_size]
        lengths = np.array([len(ids) for ids in batch], np.int32)
        ids = np.full((len(batch), max(1, int(lengths.max()))), scorer.pad_id, np.int32)
        for row, sequence in zip(ids, batch, strict=True):
            row[: len(sequence)] = sequence
        yield ids, lengths
