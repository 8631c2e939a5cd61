"""Low-rank adapters: what is trained, what stays, and that it all comes back merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_checkpoint import write_checkpoint
from tiny_run import saved_arrays, tiny_settings

from gidd_jax.errors import InputError
from gidd_jax.inference.gidd import Gidd
from gidd_jax.interchange.start import from_start
from gidd_jax.training.loop import train
from gidd_jax.training.lora import Lora

pytestmark = pytest.mark.usefixtures("on_first_device")


@pytest.fixture(scope="module")
def frozen():
    keys = iter(jax.random.split(jax.random.key(0), 9))
    shapes = {"query": (2, 6, 2, 4), "attn_out": (2, 2, 4, 6), "modulation": (2, 3, 6, 6)}
    made = {name: {"kernel": jax.random.normal(next(keys), s)} for name, s in shapes.items()}
    made["norm1"] = {"scale": jnp.ones((2, 6))}
    return {"blocks": made, "output": {"kernel": jnp.ones((6, 9))}}


def test_adapters_stand_beside_the_products_of_blocks_alone(frozen):
    adapters = Lora(3, 6.0).adapters(frozen, jax.random.key(1))
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(adapters).items()}
    assert shapes == {
        "blocks/query/a": (2, 6, 3),
        "blocks/query/b": (2, 3, 2, 4),
        "blocks/attn_out/a": (2, 2, 4, 3),
        "blocks/attn_out/b": (2, 3, 6),
    }
    merged = Lora(3, 6.0).merged(frozen, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, frozen)


def test_the_product_is_added_by_its_scale(frozen):
    lora = Lora(3, 6.0)
    adapters = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        lora.adapters(frozen, jax.random.key(1)),
    )
    merged = lora.merged(frozen, adapters)["blocks"]
    for name, formula in (("query", "lir,lrhd->lihd"), ("attn_out", "lhdr,lro->lhdo")):
        a, b = adapters["blocks"][name]["a"], adapters["blocks"][name]["b"]
        wanted = frozen["blocks"][name]["kernel"] + 2.0 * jnp.einsum(formula, a, b)
        np.testing.assert_allclose(merged[name]["kernel"], wanted, atol=1e-5)


def test_a_run_trains_adapters_alone_and_its_model_has_them_merged(tmp_path):
    model = write_checkpoint(tmp_path / "start", tmp_path, "gidd")
    model.tokenizer.save(tmp_path / "start" / "tokenizer")
    changes = {"model.start": str(tmp_path / "start"), "data.tokenizer": "start"}
    changes |= {"adapt.lora_rank": 2, "adapt.lora_alpha": 4.0, "train.num_steps": 6}
    changes |= {"optimizer.ema_decay": 0.5, "optimizer.schedule": "constant"}

    def run(folder, **more):
        settings, start = from_start(tiny_settings(tmp_path, "gidd", **(changes | more)))
        return train(settings, folder, start=start)

    figures = run(tmp_path / "run")
    first, last = (saved_arrays(tmp_path / "run", step) for step in (4, 6))
    frozen = [name for name in last if name.startswith("['frozen']")]
    trained = [name for name in last if name.startswith("['params']")]
    assert len(frozen) == len(flatten_dict(model.params))
    assert all(np.array_equal(first[name], last[name]) for name in frozen)
    assert all(not np.array_equal(first[name], last[name]) for name in trained)
    assert {name.split("'")[-2] for name in trained} == {"a", "b"}
    for ema in (False, True):
        found = Gidd.from_pretrained(tmp_path / "run", ema=ema)
        before, after = (flatten_dict(m.params) for m in (model, found))
        moved = {path[1] for path in before if not np.array_equal(before[path], after[path])}
        assert moved == {"qkv", "attn_out", "mlp_in", "mlp_out"}
    assert np.isfinite(figures["nelbo"])
    # Stopped and continued: the same run.
    run(tmp_path / "parts", **{"train.num_steps": 4})
    run(tmp_path / "parts")
    again = saved_arrays(tmp_path / "parts")
    assert all(np.array_equal(again[name], last[name]) for name in last)


def test_adapters_need_something_to_adapt(tmp_path):
    with pytest.raises(InputError, match=r"adapt\.lora_rank = 2: adapters need a model that they"):
        tiny_settings(tmp_path, "gidd", **{"adapt.lora_rank": 2})
    changes = {"adapt.lora_rank": 2, "model.start": "a", "optimizer.name": "muon"}
    with pytest.raises(InputError, match=r"optimizer\.name = muon is for whole matrices"):
        tiny_settings(tmp_path, "gidd", **changes)
    with pytest.raises(InputError, match=r"adapt\.lora_rank = -1: must be >= 0"):
        tiny_settings(tmp_path, "gidd", **{"adapt.lora_rank": -1})
