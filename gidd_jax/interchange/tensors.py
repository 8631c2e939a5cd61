"""Weights of the original PyTorch implementation and of Hugging Face checkpoints, in and out.

Pure functions between a state dict (tensor name -> array, Linear weights [out, in]) and the
parameter tree of `models`. Nothing here imports torch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.models.dit import ROTARY_BASE, VOCAB_MULTIPLE
from gidd_jax.models.llama import Shape

StateDict = dict[str, np.ndarray]
Params = dict[str, Any]
# Makes a parameter of its path and its tensors: one, or one for each of `count` layers, which may
# be read as they are asked for.
Place = Callable[[tuple[str, ...], Iterable[np.ndarray], int | None], Any]


_TABLES = ("embedding", "sink_key", "sink_value")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a torch tensor lives in our tree and how its axes are split there.

    `into` is the path under the layer stack or the root. A kernel is the transposed weight with
    its input axis split into (*in_split, rest) and its output axis into (*out_split, rest);
    vectors are split like an output axis; a table [rows, width] is taken as it is. Where tensors
    have one row per token, zero rows fill them up to a multiple of `fill`.
    """

    into: tuple[str, ...]
    in_split: tuple[int, ...] = ()
    out_split: tuple[int, ...] = ()
    fill: int = 1

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        extra = -len(array) % self.fill
        if extra:
            array = np.pad(array, [(0, extra)] + [(0, 0)] * (array.ndim - 1))
        if self.into[-1] == "kernel":
            inputs = _split(array.shape[1], self.in_split)
            return array.T.reshape(inputs + _split(array.shape[0], self.out_split))
        if self.into[-1] in _TABLES:
            return array
        return array.reshape(_split(array.shape[0], self.out_split))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if self.into[-1] == "kernel":
            inputs = math.prod(array.shape[: len(self.in_split) + 1])
            return np.ascontiguousarray(array.reshape(inputs, -1).T)
        return array if self.into[-1] in _TABLES else array.reshape(-1)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape there of a parameter of `shape` here."""
        if self.into[-1] == "kernel":
            inputs = math.prod(shape[: len(self.in_split) + 1])
            return (math.prod(shape) // inputs, inputs)
        return shape if self.into[-1] in _TABLES else (math.prod(shape),)


def _split(size: int, split: tuple[int, ...]) -> tuple[int, ...]:
    if size % math.prod(split):
        raise InputError(f"an axis of {size} does not split into {split}; check the head counts.")
    return (*split, size // math.prod(split))


def _linear(name: str, into: str, out_split: tuple[int, ...] = ()) -> dict[str, _Tensor]:
    return {
        f"{name}.weight": _Tensor((into, "kernel"), out_split=out_split),
        f"{name}.bias": _Tensor((into, "bias"), out_split=out_split),
    }


class Format(NamedTuple):
    """How a family of weights names its tensors: outside its layers, within one, what is before
    the layer's number; and what may be there and is ignored, a pattern."""

    root: Mapping[str, _Tensor]
    block: Mapping[str, _Tensor]
    prefix: str
    ignored: str

    def names(self, num_layers: int) -> dict[str, tuple[_Tensor, int | None]]:
        """Return every tensor's place and layer."""
        found: dict[str, tuple[_Tensor, int | None]] = {
            name: (tensor, None) for name, tensor in self.root.items()
        }
        for i in range(num_layers):
            found |= {f"{self.prefix}{i}.{name}": (t, i) for name, t in self.block.items()}
        return found


def dit_format(num_heads: int) -> Format:
    """The original DiT's. Published weights have one row per token, the network multiples of 128.

    Buffers (rotary caches, logit_bias) are ignored.
    """
    root = {
        "vocab_embed.embedding": _Tensor(("vocab_embed", "embedding"), fill=VOCAB_MULTIPLE),
        **_time_embedding("sigma_map.mlp.0", "sigma_map.mlp.2"),
        "output_layer.norm_final.weight": _Tensor(("final_norm", "scale")),
        **_linear("output_layer.adaLN_modulation", "final_modulation", (2,)),
        **{
            name: dataclasses.replace(tensor, fill=VOCAB_MULTIPLE)
            for name, tensor in _linear("output_layer.linear", "output").items()
        },
    }
    block = {
        "norm1.weight": _Tensor(("norm1", "scale")),
        "attn_qkv.weight": _Tensor(("qkv", "kernel"), out_split=(3, num_heads)),
        "attn_out.weight": _Tensor(("attn_out", "kernel"), in_split=(num_heads,)),
        "norm2.weight": _Tensor(("norm2", "scale")),
        **_linear("mlp.0", "mlp_in"),
        **_linear("mlp.2", "mlp_out"),
        **_linear("adaLN_modulation", "modulation", (6,)),
    }
    return Format(root, block, "blocks.", r"rotary_emb\.(cos|sin)_cached|logit_bias")


def llama_format(shape: Shape, tie_embeddings: bool) -> Format:
    """That of transformers' LlamaForCausalLM, and of Qwen2's and Qwen3's.

    A denoiser that is told the time has tensors of its own beside them.
    """
    head = {} if tie_embeddings else {"lm_head.weight": _Tensor(("output", "kernel"))}
    block = {
        "input_layernorm.weight": _Tensor(("norm1", "scale")),
        "self_attn.o_proj.weight": _Tensor(("attn_out", "kernel"), in_split=(shape.num_heads,)),
        "post_attention_layernorm.weight": _Tensor(("norm2", "scale")),
        "mlp.gate_proj.weight": _Tensor(("mlp_gate", "kernel")),
        "mlp.up_proj.weight": _Tensor(("mlp_in", "kernel")),
        "mlp.down_proj.weight": _Tensor(("mlp_out", "kernel")),
    }
    heads = {"query": shape.num_heads, "key": shape.num_kv_heads, "value": shape.num_kv_heads}
    for name, count in heads.items():
        there = f"self_attn.{name[0]}_proj"
        block[f"{there}.weight"] = _Tensor((name, "kernel"), out_split=(count,))
        if shape.qkv_bias:
            block[f"{there}.bias"] = _Tensor((name, "bias"), out_split=(count,))
    if shape.head_norms:
        block["self_attn.q_norm.weight"] = _Tensor(("query_norm", "scale"))
        block["self_attn.k_norm.weight"] = _Tensor(("key_norm", "scale"))
    if shape.out_bias:
        block["self_attn.o_proj.bias"] = _Tensor(("attn_out", "bias"))
    if shape.mlp_bias:
        for there, name in (("gate", "mlp_gate"), ("up", "mlp_in"), ("down", "mlp_out")):
            block[f"mlp.{there}_proj.bias"] = _Tensor((name, "bias"))
    root = _TRANSFORMERS_ROOT | head
    if shape.cond_dim:
        root |= _time_embedding("model.time_embed.0", "model.time_embed.2")
        root |= _linear("model.modulation", "final_modulation", (2,))
        block |= _linear("modulation", "modulation", (6,))
    ignored = r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tie_embeddings else "")
    return Format(root, block, "model.layers.", ignored)


def _time_embedding(first: str, second: str) -> dict[str, _Tensor]:
    linear = _linear(first, "input") | _linear(second, "output")
    return {
        name: dataclasses.replace(tensor, into=("time_embed", *tensor.into))
        for name, tensor in linear.items()
    }


def gidd_format(
    num_heads: int, *, normed_heads: bool, sink: bool, mlp_bias: bool, tie_embeddings: bool
) -> Format:
    """The scaling paper's. A folder with tied embeddings may hold an output layer of no use."""
    head = {} if tie_embeddings else {"lm_head.weight": _Tensor(("output", "kernel"))}
    block = {
        "attn_layernorm.weight": _Tensor(("norm1", "scale")),
        "mlp_layernorm.weight": _Tensor(("norm2", "scale")),
        **{
            f"self_attn.{name[0]}_proj.weight": _Tensor((name, "kernel"), out_split=(num_heads,))
            for name in ("query", "key", "value")
        },
        "self_attn.o_proj.weight": _Tensor(("attn_out", "kernel"), in_split=(num_heads,)),
        "mlp.up_proj.weight": _Tensor(("mlp_in", "kernel")),
        "mlp.down_proj.weight": _Tensor(("mlp_out", "kernel")),
    }
    if normed_heads:
        block["self_attn.q_norm.weight"] = _Tensor(("query_norm", "scale"))
        block["self_attn.k_norm.weight"] = _Tensor(("key_norm", "scale"))
    if sink:
        block["self_attn.k_bias"] = _Tensor(("sink_key",))
        block["self_attn.v_bias"] = _Tensor(("sink_value",))
    if mlp_bias:
        block["mlp.up_proj.bias"] = _Tensor(("mlp_in", "bias"))
        block["mlp.down_proj.bias"] = _Tensor(("mlp_out", "bias"))
    ignored = r"lm_head\.weight" if tie_embeddings else ""
    return Format(_TRANSFORMERS_ROOT | head, block, "model.layers.", ignored)


_TRANSFORMERS_ROOT = {
    "model.embed_tokens.weight": _Tensor(("vocab_embed", "embedding")),
    "model.norm.weight": _Tensor(("final_norm", "scale")),
}


def format_of(params: Params) -> Format:
    """Return the format that fits parameters (or jax.ShapeDtypeStruct) of one of our networks."""
    block = params["blocks"]
    if "qkv" in block:
        return dit_format(block["qkv"]["kernel"].shape[3])
    is_tied = "output" not in params
    if "mlp_gate" in block:
        return llama_format(_llama_shape(block), is_tied)
    return gidd_format(
        block["query"]["kernel"].shape[2],
        normed_heads="query_norm" in block,
        sink="sink_key" in block,
        mlp_bias="bias" in block["mlp_in"],
        tie_embeddings=is_tied,
    )


def _llama_shape(block: Params) -> Shape:
    """Return what the parameters of Llama blocks, stacked, tell of their shape."""
    _, hidden_size, num_heads, head_dim = block["query"]["kernel"].shape
    return Shape(
        hidden_size,
        num_heads,
        block["key"]["kernel"].shape[2],
        head_dim,
        block["mlp_in"]["kernel"].shape[2],
        qkv_bias="bias" in block["query"],
        out_bias="bias" in block["attn_out"],
        mlp_bias="bias" in block["mlp_in"],
        head_norms="query_norm" in block,
        rms_norm_eps=0.0,  # no parameter
        cond_dim=block["modulation"]["kernel"].shape[1] if "modulation" in block else 0,
    )


def on_host(path: tuple[str, ...], tensors: Iterable[np.ndarray], count: int | None) -> np.ndarray:
    """Place a parameter as a float32 NumPy array; those of layers are stacked."""
    del path
    arrays = [np.asarray(array, np.float32) for array in tensors]
    return arrays[0] if count is None else np.stack(arrays)


def check_names(state_dict: Collection[str], form: Format, num_layers: int) -> None:
    """Raise InputError naming the tensors that are missing or unknown."""
    there = {name for name in state_dict if not re.fullmatch(form.ignored, name)}
    expected = set(form.names(num_layers))
    missing, unknown = expected - there, there - expected
    if missing or unknown:
        raise InputError(
            f"the weights do not fit a model of {num_layers} layers: missing {_some(missing)}; "
            f"unknown {_some(unknown)}. Check the checkpoint and its number of layers."
        )


def params_from_torch(
    state_dict: Mapping[str, np.ndarray],
    form: Format,
    num_layers: int,
    place: Place = on_host,
) -> Params:
    """Return the parameters that tensors of a format stand for, each made by `place`.

    Raises InputError naming the tensors that are missing or unknown.
    """
    check_names(state_dict, form, num_layers)
    params: Params = {}
    for name, tensor in form.root.items():
        value = place(tensor.into, [tensor.from_torch(state_dict[name])], None)
        _put(params, tensor.into, value)
    for name, tensor in form.block.items():
        path = "blocks", *tensor.into
        numbered = (f"{form.prefix}{i}.{name}" for i in range(num_layers))
        layers = (tensor.from_torch(state_dict[full]) for full in numbered)
        _put(params, path, place(path, layers, num_layers))
    return params


class TorchTensors(Mapping[str, np.ndarray]):
    """The parameters of a network as the tensors of its format, each made when it is asked for.

    vocab_size: only that many vocabulary rows are there, as in the published folders; None: all.
    """

    def __init__(self, params: Params, vocab_size: int | None = None) -> None:
        form = format_of(params)
        self._params, self._vocab_size = params, vocab_size
        self._names = form.names(jax.tree.leaves(params["blocks"])[0].shape[0])

    def __getitem__(self, name: str) -> np.ndarray:
        tensor, layer = self._names[name]
        array = self._parameter(name)
        made = tensor.to_torch(np.asarray(array if layer is None else array[layer]))
        return made[: self._vocab_size] if tensor.fill > 1 else made

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without making it; parameters may be abstract."""
        tensor, layer = self._names[name]
        shape = tensor.torch_shape(tuple(self._parameter(name).shape[0 if layer is None else 1 :]))
        if tensor.fill > 1 and self._vocab_size is not None:
            return (self._vocab_size, *shape[1:])
        return shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        return np.dtype(self._parameter(name).dtype)

    def _parameter(self, name: str) -> Any:
        tensor, layer = self._names[name]
        return _get(self._params, tensor.into if layer is None else ("blocks", *tensor.into))

    def __contains__(self, name: object) -> bool:  # without making it
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def dit_rotary_buffers(max_seq_len: int, head_dim: int) -> StateDict:
    """The rotary caches the original keeps in its state dict, float32 [1, L, 3, 1, head_dim].

    The axis of 3 is query, key, value; values are not rotated.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(ROTARY_BASE) ** exponent
    angle = np.arange(max_seq_len, dtype=np.float32)[:, None] * frequency[None, :]
    angle = np.concatenate([angle, angle], axis=-1)[None, :, None, None, :]
    cos, sin = np.repeat(np.cos(angle), 3, axis=2), np.repeat(np.sin(angle), 3, axis=2)
    cos[:, :, 2], sin[:, :, 2] = 1.0, 0.0
    return {"rotary_emb.cos_cached": cos, "rotary_emb.sin_cached": sin}


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest


def _put(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    node: Any = tree
    for key in path:
        node = node[key]
    return node
