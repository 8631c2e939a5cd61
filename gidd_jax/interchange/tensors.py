"""Weights of the original PyTorch implementation and of Hugging Face checkpoints, in and out.

Pure functions between a state dict (tensor name -> array, Linear weights [out, in]) and the
parameter tree of `models`. Nothing here imports torch.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gidd_jax.errors import InputError
from gidd_jax.models.dit import ROTARY_BASE, padded_vocab_size

StateDict = dict[str, np.ndarray]
Params = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
_DIT_VOCABULARY = (
    "vocab_embed.embedding",
    "output_layer.linear.weight",
    "output_layer.linear.bias",
)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a torch tensor lives in our tree and how its axes are split there.

    `into` is the path under the layer stack or the root. A kernel is the transposed weight with
    its input axis split into (*in_split, rest) and its output axis into (*out_split, rest);
    vectors are split like an output axis; a table [rows, width] is taken as it is.
    """

    into: tuple[str, ...]
    in_split: tuple[int, ...] = ()
    out_split: tuple[int, ...] = ()

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array).astype(np.float32)
        if self.into[-1] == "kernel":
            inputs = _split(array.shape[1], self.in_split)
            return array.T.reshape(inputs + _split(array.shape[0], self.out_split))
        if self.into[-1] == "embedding":
            return array
        return array.reshape(_split(array.shape[0], self.out_split))

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if self.into[-1] == "kernel":
            inputs = math.prod(array.shape[: len(self.in_split) + 1])
            return np.ascontiguousarray(array.reshape(inputs, -1).T)
        return array if self.into[-1] == "embedding" else array.reshape(-1)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape there of a parameter of `shape` here."""
        if self.into[-1] == "kernel":
            inputs = math.prod(shape[: len(self.in_split) + 1])
            return (math.prod(shape) // inputs, inputs)
        return shape if self.into[-1] == "embedding" else (math.prod(shape),)


def _split(size: int, split: tuple[int, ...]) -> tuple[int, ...]:
    if size % math.prod(split):
        raise InputError(f"an axis of {size} does not split into {split}; check the head counts.")
    return (*split, size // math.prod(split))


def _linear(name: str, into: str, out_split: tuple[int, ...] = ()) -> dict[str, _Tensor]:
    return {
        f"{name}.weight": _Tensor((into, "kernel"), out_split=out_split),
        f"{name}.bias": _Tensor((into, "bias"), out_split=out_split),
    }


def _dit_tensors(num_heads: int) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
    """Names of the original DiT outside its blocks, and within one block."""
    root = {
        "vocab_embed.embedding": _Tensor(("vocab_embed", "embedding")),
        **{
            name: dataclasses.replace(tensor, into=("time_embed", *tensor.into))
            for name, tensor in (
                _linear("sigma_map.mlp.0", "input") | _linear("sigma_map.mlp.2", "output")
            ).items()
        },
        "output_layer.norm_final.weight": _Tensor(("final_norm", "scale")),
        **_linear("output_layer.adaLN_modulation", "final_modulation", (2,)),
        **_linear("output_layer.linear", "output"),
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
    return root, block


def _llama_tensors(
    num_heads: int, num_kv_heads: int, tie_embeddings: bool
) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
    """Names of transformers' LlamaForCausalLM outside its layers, and within one layer."""
    root = {
        "model.embed_tokens.weight": _Tensor(("vocab_embed", "embedding")),
        "model.norm.weight": _Tensor(("final_norm", "scale")),
    }
    if not tie_embeddings:
        root["lm_head.weight"] = _Tensor(("output", "kernel"))
    block = {
        "input_layernorm.weight": _Tensor(("norm1", "scale")),
        "self_attn.q_proj.weight": _Tensor(("query", "kernel"), out_split=(num_heads,)),
        "self_attn.k_proj.weight": _Tensor(("key", "kernel"), out_split=(num_kv_heads,)),
        "self_attn.v_proj.weight": _Tensor(("value", "kernel"), out_split=(num_kv_heads,)),
        "self_attn.o_proj.weight": _Tensor(("attn_out", "kernel"), in_split=(num_heads,)),
        "post_attention_layernorm.weight": _Tensor(("norm2", "scale")),
        "mlp.gate_proj.weight": _Tensor(("mlp_gate", "kernel")),
        "mlp.up_proj.weight": _Tensor(("mlp_in", "kernel")),
        "mlp.down_proj.weight": _Tensor(("mlp_out", "kernel")),
    }
    return root, block


def dit_params_from_torch(
    state_dict: Mapping[str, np.ndarray], num_layers: int, num_heads: int
) -> Params:
    """float32 parameters of `models.dit.DiT` from the original's training or published weights.

    Published weights have one row per token; zero rows fill the vocabulary up to the model's
    multiple of 128. Buffers (rotary caches, logit_bias) are ignored. Raises InputError naming
    the tensors that are missing or unknown.
    """
    tensors = _without(state_dict, r"rotary_emb\.(cos|sin)_cached|logit_bias")
    root, block = _dit_tensors(num_heads)
    params = _params(tensors, root, block, "blocks.", num_layers)
    rows = params["vocab_embed"]["embedding"].shape[0]
    extra = padded_vocab_size(rows) - rows
    embed, output = params["vocab_embed"], params["output"]
    embed["embedding"] = np.pad(embed["embedding"], ((0, extra), (0, 0)))
    output["kernel"] = np.pad(output["kernel"], ((0, 0), (0, extra)))
    output["bias"] = np.pad(output["bias"], (0, extra))
    return params


def dit_params_to_torch(params: Params, vocab_size: int | None = None) -> StateDict:
    """State dict of the original's DiT, the inverse of dit_params_from_torch, without buffers.

    With `vocab_size` only that many vocabulary rows are written, as in the published folders.
    """
    num_heads = params["blocks"]["qkv"]["kernel"].shape[3]
    root, block = _dit_tensors(num_heads)
    state_dict = _state_dict(params, root, block, "blocks.")
    for name in _DIT_VOCABULARY:
        state_dict[name] = state_dict[name][:vocab_size]
    return state_dict


def dit_tensor_shapes(params: Params, vocab_size: int | None = None) -> Shapes:
    """Shapes of what dit_params_to_torch returns; `params` may be jax.ShapeDtypeStruct."""
    root, block = _dit_tensors(params["blocks"]["qkv"]["kernel"].shape[3])
    shapes = _shapes(params, root, block, "blocks.")
    if vocab_size is not None:
        shapes |= {name: (vocab_size, *shapes[name][1:]) for name in _DIT_VOCABULARY}
    return shapes


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


def llama_params_from_torch(
    state_dict: Mapping[str, np.ndarray],
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    tie_embeddings: bool = False,
) -> Params:
    """float32 parameters of `models.llama.Llama` from a transformers Llama state dict.

    With `tie_embeddings` an lm_head is ignored. Raises InputError naming the tensors that are
    missing or unknown.
    """
    ignored = r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tie_embeddings else "")
    root, block = _llama_tensors(num_heads, num_kv_heads or num_heads, tie_embeddings)
    tensors = _without(state_dict, ignored)
    return _params(tensors, root, block, "model.layers.", num_layers)


def llama_params_to_torch(params: Params) -> StateDict:
    """State dict of transformers' LlamaForCausalLM, the inverse of llama_params_from_torch."""
    return _state_dict(params, *_llama_tensors_of(params), "model.layers.")


def llama_tensor_shapes(params: Params) -> Shapes:
    """Shapes of what llama_params_to_torch returns; `params` may be jax.ShapeDtypeStruct."""
    return _shapes(params, *_llama_tensors_of(params), "model.layers.")


def _llama_tensors_of(params: Params) -> tuple[dict[str, _Tensor], dict[str, _Tensor]]:
    num_heads = params["blocks"]["query"]["kernel"].shape[2]
    num_kv_heads = params["blocks"]["key"]["kernel"].shape[2]
    return _llama_tensors(num_heads, num_kv_heads, "output" not in params)


def _without(state_dict: Mapping[str, np.ndarray], ignored: str) -> StateDict:
    return {name: a for name, a in state_dict.items() if not re.fullmatch(ignored, name)}


def _params(
    state_dict: StateDict,
    root: Mapping[str, _Tensor],
    block: Mapping[str, _Tensor],
    prefix: str,
    num_layers: int,
) -> Params:
    expected = set(root) | {f"{prefix}{i}.{name}" for i in range(num_layers) for name in block}
    missing, unknown = expected - set(state_dict), set(state_dict) - expected
    if missing or unknown:
        raise InputError(
            f"the weights do not fit a model of {num_layers} layers: missing {_some(missing)}; "
            f"unknown {_some(unknown)}. Check the checkpoint and its number of layers."
        )
    params: Params = {}
    for name, tensor in root.items():
        _put(params, tensor.into, tensor.from_torch(state_dict[name]))
    for name, tensor in block.items():
        layers = [tensor.from_torch(state_dict[f"{prefix}{i}.{name}"]) for i in range(num_layers)]
        _put(params, ("blocks", *tensor.into), np.stack(layers))
    return params


def _state_dict(
    params: Params, root: Mapping[str, _Tensor], block: Mapping[str, _Tensor], prefix: str
) -> StateDict:
    state_dict = {name: tensor.to_torch(_get(params, tensor.into)) for name, tensor in root.items()}
    for name, tensor in block.items():
        stacked = np.asarray(_get(params, ("blocks", *tensor.into)))
        for i, layer in enumerate(stacked):
            state_dict[f"{prefix}{i}.{name}"] = tensor.to_torch(layer)
    return state_dict


def _shapes(
    params: Params, root: Mapping[str, _Tensor], block: Mapping[str, _Tensor], prefix: str
) -> Shapes:
    shapes = {name: t.torch_shape(_get(params, t.into).shape) for name, t in root.items()}
    for name, tensor in block.items():
        num_layers, *shape = _get(params, ("blocks", *tensor.into)).shape
        for i in range(num_layers):
            shapes[f"{prefix}{i}.{name}"] = tensor.torch_shape(tuple(shape))
    return shapes


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + rest


def _put(tree: Params, path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    node: Any = tree
    for key in path:
        node = node[key]
    return node
