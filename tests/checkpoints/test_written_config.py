"""config.json of a written folder says the same model in the keys of older and of newer readers."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import families, published, tiny

from qtool.checkpoints import written_config
from qtool.config.quant import QuantConfig
from qtool.models.folders import read_config

OLDER = [name for name in published.MODELS if name != "own head"]


def loaded(folder: Path) -> dict[str, Any]:
    """Return the config that transformers loads, without what quantizing changes, and what it reads no more.

    Older keys beside ``rope_parameters`` are attributes of some classes, in some versions only.
    """
    config: dict[str, Any] = transformers.AutoConfig.from_pretrained(folder).to_dict()
    left = ("quantization_config", "_name_or_path", "dtype", *written_config.OLDER)
    return {key: value for key, value in config.items() if key not in left}


@pytest.mark.parametrize("name", OLDER)
def test_the_keys_of_a_published_config_stay_as_they_were(name: str, tmp_path: Path) -> None:
    config = read_config(published.quantized(name, tmp_path, older=True))
    source = read_config(tmp_path / "float")
    assert "rope_parameters" not in source
    assert config["rope_parameters"]
    kept = source.keys() - {"transformers_version"}
    assert {key: config[key] for key in kept} == {key: source[key] for key in kept}


@pytest.mark.parametrize("name", OLDER)
def test_a_config_of_transformers_5_gets_the_keys_of_transformers_4(name: str, tmp_path: Path) -> None:
    config = read_config(published.quantized(name, tmp_path, older=False))
    expected = copy.deepcopy(published.MODELS[name][3])
    scaling = expected.pop("rope_scaling", None)
    if scaling is not None:
        scaling["type"] = scaling.get("type", scaling.get("rope_type"))
    assert {key: config[key] for key in expected} == expected
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == read_config(tmp_path / "float")["rope_parameters"]


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """Take the rotary embedding out of ``config``; without ``type``, the older name of ``rope_type``."""
    found: dict[str, Any] = config.pop("rope_parameters")
    main = found.get("full_attention", found)
    assert main.pop("type", main["rope_type"]) == main["rope_type"]
    return found


def serialised(**values: Any) -> dict[str, Any]:
    """Return a config as transformers 5 writes it."""
    config: dict[str, Any] = json.loads(transformers.AutoConfig.for_model(**copy.deepcopy(values)).to_json_string())
    return config


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("name", OLDER)
def test_transformers_loads_the_same_config_as_before(name: str, older: bool, tmp_path: Path) -> None:
    out = published.quantized(name, tmp_path, older=older)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loaded(out)
    expected = loaded(tmp_path / "float")
    assert rope(found) == rope(expected)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(("tied", "own"), [(True, False), (True, True), (False, True)])
def test_the_tie_of_the_head_is_said_as_it_is_computed(tied: bool, own: bool, tmp_path: Path) -> None:
    if tied and own:
        floats = published.write("own head", tmp_path / "float", older=True)
    else:
        floats = tiny.llama(tmp_path / "float", tied=tied)
    assert read_config(floats).get("tie_word_embeddings", False) == tied
    tiny.quantize(floats, tmp_path / "q", QuantConfig(group_size=32))
    assert read_config(tmp_path / "q")["tie_word_embeddings"] is (not own)
    assert ("lm_head.weight" in tiny.stored(tmp_path / "q")) == own


def test_the_dtype_is_said_under_both_names_at_every_level(tmp_path: Path) -> None:
    config = {"model_type": "llama", "dtype": "float32", "part_config": {"torch_dtype": "float32"}, "x_config": {}}
    made = written_config.written(config, None, "float16", None)
    assert (made["dtype"], made["torch_dtype"]) == ("float16", "float16")
    assert made["part_config"] == {"dtype": "float16", "torch_dtype": "float16"}
    assert made["x_config"] == {}


def test_keys_of_the_text_model_inside_another_config_are_kept_and_derived() -> None:
    text = families.GATED | families.LOCAL_AND_GLOBAL | {"head_dim": 16, "model_type": "gemma3_text"}
    source: dict[str, Any] = {
        "model_type": "gemma3",
        "text_config": text | {"rope_scaling": published.LINEAR, "rope_theta": 5000.0, "torch_dtype": "bfloat16"},
    }
    config = serialised(**source)
    assert "rope_theta" not in config["text_config"]
    made = written_config.written(config, source, "float32", None)["text_config"]
    assert (made["rope_theta"], made["rope_scaling"]) == (5000.0, published.LINEAR)
    assert made["rope_local_base_freq"] == 10000.0
    assert made["torch_dtype"] == "float32"


def test_an_older_key_that_contradicts_rope_parameters_is_not_kept() -> None:
    # transformers 5 reads rope_parameters, and transformers 4 would read the other
    source: dict[str, Any] = {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rope_theta": 9.0,
    }
    config = serialised(**source)
    assert written_config.written(config, source, "float32", None)["rope_theta"] == 500.0
    assert written_config.misread(config | {"rope_theta": 9.0}) == "rope_theta"
    assert written_config.misread(config | {"rope_theta": 500.0}) is None
    assert "rope_theta" in written_config.notes(config | {"rope_theta": 9.0})[0]


def test_what_the_source_says_of_its_own_folder_is_not_kept() -> None:
    source = {"model_type": "llama", "_name_or_path": "/home/somebody/x", "auto_map": {}, "return_dict": True}
    config = serialised(model_type="llama")
    made = written_config.written(config, source, "float32", None)
    assert made["return_dict"] is True
    assert not {"_name_or_path", "auto_map"} & made.keys()


def test_a_value_of_the_source_that_would_change_the_model_is_not_kept() -> None:
    config = serialised(model_type="llama", hidden_size=64, num_attention_heads=4)
    made = written_config.written(
        config, {"model_type": "llama", "hidden_size": 128, "return_dict": True}, "float32", None
    )
    assert made["hidden_size"] == 64
    assert made["return_dict"] is True


def test_an_embedding_that_older_keys_cannot_say_is_noted() -> None:
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    config = {"model_type": "olmo3", "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    made = written_config.written(config | {"rope_parameters": rope}, None, "float32", None)
    assert "rope_theta" not in made
    assert written_config.notes(made) == [
        "config.json has the rotary embedding in rope_parameters only, which transformers 4 does not read"
    ]


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ({"a": 1, "b_config": {"x": 1}}, None),
        ({"a": 1, "b_config": {"x": 1, "dtype": "float32"}, "rope_theta": 5.0, "torch_dtype": "float32"}, None),
        ({"a": 2, "b_config": {"x": 1}}, "a"),
        ({"b_config": {"x": 1}}, "a"),
        ({"a": 1, "b_config": {"x": 2}}, "b_config.x"),
        ({"a": 1, "b_config": {"x": 1}, "c": None}, "c"),
    ],
)
def test_a_key_that_an_export_changed_is_named(theirs: dict[str, Any], found: str | None) -> None:
    assert written_config.difference(theirs, {"a": 1, "b_config": {"x": 1}}) == found


def test_an_older_key_that_an_export_lost_is_named() -> None:
    assert written_config.difference({}, {"rope_theta": 5.0}) == "rope_theta"
