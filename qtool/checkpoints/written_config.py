"""``config.json`` of a written folder, in the words that older and newer readers know.

transformers 5 keeps the rotary embedding in ``rope_parameters``. Published models, mlx-lm, transformers 4 and engines
built on it say it in keys such as ``rope_theta``, and take their own defaults, without an error, where those are
missing. So a folder carries both. The keys of the float model's own ``config.json`` are kept as they are, and what they
lack is derived from ``rope_parameters``. transformers itself is asked whether older keys are right: it reads them too,
and must find the same model with them, and also with them alone.
"""

import copy
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Config = dict[str, Any]  # the content of a config.json
Place = tuple[str, ...]  # keys that lead to a section of a config: () is the whole, ("text_config",) a part

ROPE = "rope_parameters"
# older keys of the rotary embedding
OLDER = (
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "global_rope_theta",
    "local_rope_theta",
    "rotary_emb_base",
    "rotary_pct",
)
# older keys of model types that have others than rope_theta and partial_rotary_factor; "local": the base of layers that
# attend to a sliding window
NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
    "gemma3_text": {"local": "rope_local_base_freq"},
    "gemma3n_text": {"local": "rope_local_base_freq"},
}
# keys that are never taken from the float model's config: what they say is about its own folder
NOT_KEPT = ("_name_or_path", "auto_map", "quantization_config", "transformers_version", "dtype", "torch_dtype")
TIED = "tie_word_embeddings"
# keys that an export may add or change: the tie of the head can be wrong in the checkpoints of earlier versions
FREE = (*OLDER, "dtype", "torch_dtype", TIED)


def written(config: Config, source: Config | None, dtype: str, tied: bool | None) -> Config:
    """Return ``config``, as transformers 5 writes it, with the keys that other readers need.

    ``source`` is the config of the float model; ``None`` if ``config`` has its keys already, in an export. ``dtype`` is
    that of the written tensors. ``tied`` says if the output head is the embedding; ``None``: as ``config`` says, which
    may be wrong, as a config can say so of a model whose files hold a head of their own.
    """
    merged: Config = copy.deepcopy(config)
    for place in _places(merged):
        section = _at(merged, place)
        if not place or "dtype" in section or "torch_dtype" in section:
            section["dtype"] = section["torch_dtype"] = dtype  # transformers 4 had the second name until 4.56
    if tied is None:  # readers have different defaults
        tied = merged.get(TIED, (reading(merged) or {}).get(TIED))
    for place in ((), ("text_config",)):
        if isinstance(_at(merged, place), dict) and tied is not None:
            _at(merged, place)[TIED] = tied
    wanted = reading(merged)
    if wanted is None:
        return merged
    if source is not None:
        merged = _with_source(merged, source, wanted)
    return _with_older_keys(merged, config if source is None else source, wanted)


def reading(config: Config) -> Config | None:
    """Return what transformers makes of ``config``, without quantization and names; ``None`` if it refuses it."""
    content = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    with _silent():
        try:
            found: Config = CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(content)).to_dict()
        except Exception:  # config classes check their values with errors of many kinds
            return None
    found.pop("_name_or_path", None)
    return {key: _in_new_words(value) for key, value in found.items() if key not in _left(found)}


def notes(config: Config) -> list[str]:
    """Return notes on each ``rope_parameters`` that older readers do not find in their own words, for users."""
    found = []
    for place in _places(config):
        name = ".".join((*place, ROPE))
        older = [key for key in OLDER if key in _at(config, place)]
        if _at(config, place).get(ROPE) and not older:
            found.append(f"config.json has the rotary embedding in {name} only, which transformers 4 does not read")
    if (key := misread(config)) is not None:
        found.append(
            f"config.json has another rotary embedding in {key}, as the float model has it, than in {ROPE}: "
            "transformers 4 reads the first, and transformers 5 the second"
        )
    return found


def misread(config: Config) -> str | None:
    """Return an older key by which a reader would compute another model than by ``rope_parameters``, or ``None``."""
    wanted = reading(config)
    for place in _places(config):
        section = _at(config, place)
        older = [key for key in OLDER if key in section]
        if section.get(ROPE) and older and reading(_without_rope(config, place)) != wanted:
            return ".".join((*place, older[0]))
    return None


def difference(theirs: Config, mine: Config, ignored: Collection[str] = (), free: Collection[str] = FREE) -> str | None:
    """Return the dotted name of a key by which ``theirs``, made from ``mine``, differs from it; ``None`` if none does.

    Keys that are ``free`` may be added or have other values, but not be lost.
    """
    for key in sorted(theirs.keys() | mine.keys()):
        ours, found = mine.get(key), theirs.get(key)
        if key in ignored:
            continue
        if key in free:
            if key not in theirs:
                return key
        elif isinstance(ours, dict) and isinstance(found, dict):
            if (inner := difference(found, ours, (), free)) is not None:
                return f"{key}.{inner}"
        elif ours != found or (key in theirs) != (key in mine):
            return key
    return None


def _with_source(config: Config, source: Config, wanted: Config) -> Config:
    """Return ``config`` with the values of ``source`` wherever transformers reads the same model with them."""
    whole = _merged(config, source)
    if reading(whole) == wanted:
        return whole
    kept = config
    for place in _places(config):
        there = _at(source, place)
        for key in there if isinstance(there, dict) else ():
            if key in NOT_KEPT or key in OLDER or key in (ROPE, TIED) or isinstance(there[key], dict):
                continue
            trial = copy.deepcopy(kept)
            _at(trial, place)[key] = there[key]
            if trial != kept and reading(trial) == wanted:
                kept = trial
    return kept


def _merged(config: Config, source: Config) -> Config:
    """Return ``config`` with all keys of ``source`` that say something about the model."""
    merged = dict(config)
    for key, value in source.items():
        if key in NOT_KEPT or key in OLDER or key in (ROPE, TIED):
            continue
        ours = config.get(key)
        merged[key] = _merged(ours, value) if isinstance(ours, dict) and isinstance(value, dict) else value
    return merged


def _with_older_keys(config: Config, source: Config, wanted: Config) -> Config:
    """Return ``config`` with older keys beside each ``rope_parameters``, if they say the same."""
    for place in _places(config):
        rope = _at(config, place).get(ROPE)
        if not isinstance(rope, dict) or not rope:
            continue
        there = _at(source, place)
        own = {key: there[key] for key in OLDER if key in there} if isinstance(there, dict) else {}
        kind = str(_at(config, place).get("model_type", ""))
        for keys in (*({**derived, **own} for derived in _older(rope, kind)), *_older(rope, kind), own):
            trial = copy.deepcopy(config)
            section = _at(trial, place)
            for key in OLDER:
                section.pop(key, None)
            section |= keys
            if keys and reading(trial) == wanted and reading(_without_rope(trial, place)) == wanted:
                config = trial
                break
    return config


def _older(rope: Config, kind: str) -> Iterator[Config]:
    """Yield the older keys for ``rope``, the ``rope_parameters`` of the model type ``kind``, the likeliest first."""
    names = NAMES.get(kind, {})
    main, local = rope, None
    if isinstance(rope.get("full_attention"), dict):  # one embedding for each kind of layer
        main, local = rope["full_attention"], rope.get("sliding_attention")
    moved = ("rope_theta", "partial_rotary_factor")
    keys = {names.get(key, key): main[key] for key in moved if main.get(key) is not None}
    if isinstance(local, dict) and "local" in names:
        keys[names["local"]] = local.get("rope_theta")
    rest = {key: value for key, value in main.items() if key not in moved}
    type_ = rest.get("rope_type", "default")
    if rest in ({}, {"rope_type": "default"}):
        yield {**keys, "rope_scaling": None}
        return
    if type_ == "longrope":  # Phi-3 of transformers 4 refuses any further key
        yield {**keys, "rope_scaling": {"type": type_, **{k: rest.get(k) for k in ("short_factor", "long_factor")}}}
    yield {**keys, "rope_scaling": {"type": type_, **rest}}


def _places(config: Config) -> list[Place]:
    """Return the places of the whole config and of each config in it, such as that of the text model."""
    inner = [
        (key, *place)
        for key, value in config.items()
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict)
        for place in _places(value)
    ]
    return [(), *inner]


def _at(config: Config, place: Place) -> Any:  # Any: a dict, or whatever else is there
    found: Any = config
    for key in place:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _without_rope(config: Config, place: Place) -> Config:
    changed = copy.deepcopy(config)
    _at(changed, place).pop(ROPE)
    return changed


def _left(section: Config) -> tuple[str, ...]:
    """Return older keys that transformers leaves beside the newer ones that it reads."""
    twice = ("type",) if section.get("type") == section.get("rope_type") else ()
    return (*OLDER, *twice) if section.get(ROPE) else twice


def _in_new_words(value: Any) -> Any:  # Any: JSON
    """Return ``value`` without older keys beside newer ones."""
    if not isinstance(value, dict):
        return value
    return {key: _in_new_words(inner) for key, inner in value.items() if key not in _left(value)}


@contextmanager
def _silent() -> Iterator[None]:
    """Silence warnings about configs that are only tried."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
