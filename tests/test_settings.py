"""Settings: types, legal values, values that exclude each other, differences."""

import json

import pytest

from gidd_jax.cli import load_config
from gidd_jax.errors import InputError
from gidd_jax.settings import MAY_CHANGE_ON_RESUME, Settings, difference


def make(name: str = "base", **changes) -> Settings:
    """Return the settings of a shipped config with `section__key` changes."""
    values = load_config(name).to_dict()
    for key, value in changes.items():
        *section, leaf = key.split("__")
        target = values[section[0]] if section else values
        target[leaf] = value
    return Settings.from_config(values)


def test_json_round_trip():
    settings = make(process__p_uniform=0.2)
    assert Settings.from_config(json.loads(settings.to_json())) == settings
    assert settings.process.p_uniform == 0.2


def test_an_integer_serves_as_a_float_but_keeps_no_other_type():
    assert isinstance(make(optimizer__clip_norm=1).optimizer.clip_norm, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__num_layers": 2.0}, "model.num_layers = 2.0: must be an integer"),
        ({"model__num_layers": True}, "model.num_layers = True: must be an integer"),
        ({"model__scan_layers": 1}, "model.scan_layers = 1: must be true or false"),
        ({"model__name": None}, "model.name = None: must be a string"),
        ({"optimizer__eps": "1e-9"}, "optimizer.eps = '1e-9': must be a number"),
        ({"seed": -1}, "seed = -1: must be >= 0"),
        ({"model": 3}, "model = 3: must be a section of keys"),
        ({"model__name": "dti"}, "model.name = 'dti': must be dit | gidd | llama"),
        ({"model__attention": "flash"}, "must be '' | xla | cudnn | splash"),
        ({"model__dtype": "float16"}, "must be float32 | bfloat16"),
        ({"model__num_layers": 0}, "must be >= 1"),
        ({"process__p_uniform": 1.0}, "process.p_uniform = 1.0: must be in [0, 1)"),
        ({"process__p_uniform": -0.1}, "must be in [0, 1)"),
        ({"process__gamma": 0}, "must be in (0, 2]"),
        ({"process__gamma": 2.1}, "must be in (0, 2]"),
        ({"process__t_eps": 0.5}, "must be in (0, 0.5)"),
        ({"process__p_uniform": float("nan")}, "must be in [0, 1)"),
        ({"data__mode": "pack"}, "must be crop | packed | padded"),
        ({"data__validation": "last:0"}, "must be last:COUNT | hash:FRACTION"),
        ({"data__validation": "hash:1.5"}, "must be last:COUNT | hash:FRACTION"),
        ({"optimizer__b2": 1.0}, "must be in [0, 1)"),
        ({"optimizer__learning_rate": 0.0}, "must be > 0"),
        ({"optimizer__clip_norm": float("inf")}, "must be >= 0 and finite; 0 is off"),
        ({"optimizer__norm_decay": 0.1}, "only model.parametrization = completep has it"),
        ({"optimizer__bias_decay": 0.1}, "only model.parametrization = completep has it"),
        ({"optimizer__cooldown_steps": 1}, "only optimizer.schedule = wsd has a cooldown"),
        (
            {"optimizer__schedule": "wsd", "optimizer__cooldown_steps": 490_001},
            "optimizer.cooldown_steps = 500001: must be at most train.num_steps = 500000",
        ),
        (
            {"model__name": "gidd", "model__parametrization": "completep"}
            | {"optimizer__name": "muon"},
            "optimizer.name = muon: model.parametrization = completep has rates for adamw and",
        ),
        ({"train__batch_size": 0}, "must be >= 1"),
        ({"mesh__data": 0}, "must be >= 1, or -1"),
        ({"checkpoint__max_to_keep": 0}, "must be >= 1"),
        ({"model__num_layer": 3}, "unknown config key model.num_layer: did you mean num_layers?"),
        ({"sede": 3}, "unknown config key sede: did you mean seed?"),
        ({"model__num_heads": 7}, "must be a multiple of 2 * model.num_heads = 14"),
        ({"model__hidden_size": 12}, "must be a multiple of 2 * model.num_heads = 24"),
        ({"model__cond_dim": 0}, "model.cond_dim = 0: a dit is told the time"),
        ({"model__head_dim": 3}, "model.head_dim = 3: must be even and >= 0"),
        (
            {"model__name": "llama", "model__num_kv_heads": 5},
            "model.num_kv_heads = 5: must divide model.num_heads = 12",
        ),
        ({"model__rope_scaling": "ntk:2"}, "must be linear:NUMBERS | llama3:NUMBERS | yarn:"),
        ({"model__head_norms": True}, "model.head_norms = True: only model.name = llama reads it"),
        (
            {"train__padding_weight": 0.5, "train__mask_padding": True},
            "train.padding_weight = 0.5: nothing reads it with train.mask_padding = True",
        ),
        ({"model__shift": True}, "model.shift = True: only a llama with a diffusion process"),
        ({"adapt__attention_steps": 1}, "only the attention of a llama with a diffusion process"),
        (
            {"adapt__noise_steps": 1, "process__name": "log_snr"},
            "adapt.noise_steps = 1: process.name = log_snr has no p_uniform",
        ),
        (
            {"adapt__noise_steps": 500_001},
            "adapt.noise_steps = 500001: must be at most train.num_steps = 500000",
        ),
        ({"process__name": "autoregressive"}, "model.name = dit does not fit"),
        ({"process__max_log_snr": -9.0}, "must be less than process.max_log_snr"),
        ({"train__micro_batches": 3}, "must be a multiple of train.micro_batches = 3"),
        ({"train__min_weight": 3.0}, "must be at most train.max_weight = 2.0"),
        ({"process__name": "masked"}, "process.name = masked has elbo"),
        (
            {"process__name": "log_snr", "train__weighting": "dynamic_v1_1"},
            "process.name = log_snr has elbo and clip and dynamic",
        ),
        ({"mesh__fsdp": -1}, "at most one of"),
        ({"data__tokenizer": "ids:1"}, "chars:FILE, or ids:VOCAB with VOCAB from 2 on"),
        ({"data__tokenizer": "chars:"}, "chars:FILE, or ids:VOCAB with VOCAB from 2 on"),
        ({"data__frame": "bos"}, "data.frame = 'bos': must be ends | none"),
        ({"data__marked": True}, "data.marked = True: only rows without a frame do"),
        ({"process__by_position": 1.5}, "process.by_position = 1.5: must be in [0, 1]"),
        (
            {"process__by_position": 0.75, "process__ascending": 0.5},
            "process.ascending = 0.5: must be at most 1 - process.by_position = 0.25",
        ),
        ({"process__uniform_ids": "mask"}, "must be others | all"),
        (
            {"process__name": "masked", "train__weighting": "elbo", "process__uniform_ids": "all"},
            "process.uniform_ids = all: process.name = masked does not read it",
        ),
        ({"data__givens_kind": "prompt"}, "data.givens_kind = prompt: nothing is given with"),
        ({"data__givens_kind": "prompts"}, "must be mixed | prompt | infilling"),
        ({"data__empty_tokens": 0.6}, "data.empty_tokens = 0.6: must be in [0, 0.5]"),
        (
            {"data__empty_tokens": 0.1, "data__frame": "none"},
            "data.empty_tokens = 0.1: rows without",
        ),
        ({"train__aggregation": "max"}, "must be mean | sum"),
    ],
)
def test_illegal_values_are_named_with_what_is_legal(change, message):
    with pytest.raises(InputError) as caught:
        make(**change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_edges_of_the_legal_ranges():
    make(process__p_uniform=0.0, process__gamma=2, train__min_weight=2.0, optimizer__b1=0.0)
    make(data__validation="hash:.01", train__eval_every=0, optimizer__warmup_steps=0)
    make(data__validation="last:100000", train__micro_batches=512)
    make(process__name="log_snr", train__weighting="clip", mesh__data=1, mesh__fsdp=-1)
    make(optimizer__schedule="wsd", optimizer__cooldown_steps=490_000, optimizer__clip_norm=0)


def test_rows_without_a_frame_are_of_diffusion_and_read_no_mode():
    data = make(data__frame="none", data__mode="padded", data__tokenizer="ids:9").data
    assert data.row_mode == "none"
    assert make(data__mode="padded").data.row_mode == "padded"
    with pytest.raises(InputError, match=r"data\.frame = none: an autoregressive model"):
        make("ar", data__frame="none")


def test_only_diffusion_has_times_of_positions():
    with pytest.raises(InputError, match=r"process\.by_position = 0\.5, process\.ascending = 0\.0"):
        make("ar", process__by_position=0.5)


def test_a_missing_key_is_named():
    values = load_config("base").to_dict()
    del values["train"]["weighting"]
    with pytest.raises(InputError, match=r"config key train\.weighting is missing"):
        Settings.from_config(values)
    del values["train"]
    with pytest.raises(InputError, match="config key train is missing"):
        Settings.from_config(values)


def test_difference_names_what_a_run_may_not_change():
    old = make()
    new = make(
        model__num_layers=8,
        seed=1,
        train__num_steps=7,
        logging__every=3,
        checkpoint__every=9,
        mesh__fsdp=2,
        train__eval_every=1,
        train__eval_batches=2,
        data__num_workers=2,
    )
    assert difference(old, new, ignore=MAY_CHANGE_ON_RESUME) == [
        "seed: 0 -> 1",
        "model.num_layers: 12 -> 8",
    ]
    assert len(difference(old, new)) == 9
    assert difference(old, old) == []


def test_the_config_of_a_sweep_is_no_run():
    with pytest.raises(InputError, match=r"config of a sweep: train it with gidd_jax\.sweep"):
        Settings.from_config(load_config("ablation"))


def test_a_run_saved_before_a_key_existed_is_read_with_the_base_value():
    settings = make("quickstart", process__p_uniform=0.2)
    saved = json.loads(settings.to_json())
    del saved["optimizer"]["skip_above"], saved["mesh"]
    saved["logging"]["profile_at"] = 7  # a key that is no more
    assert Settings.from_saved(saved) == settings
    with pytest.raises(InputError, match=r"unknown config key model\.layers"):
        Settings.from_saved({**saved, "model": {**saved["model"], "layers": 2}})
    with pytest.raises(InputError, match="must be sections"):
        Settings.from_saved([])  # pyright: ignore[reportArgumentType]
