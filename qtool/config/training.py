"""Recipe sections that training methods share: presets, rounding, optimizer, and training of the whole model."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from qtool.config.section import Section
from qtool.config.sections import MethodConfig

OVERSHOOT = {"logistic": 0.2785, "gaussian": 0.1700}  # overshoot of a soft clamp beyond its end, times its sharpness


class RoundingConfig(Section):
    """The gradient of rounding and clamping in training. It does not change how the final weight is rounded."""

    estimator: Literal["ste", "sigmoid", "sigmoid-local", "dsq"] = Field(
        "ste",
        description="Gradient of rounding. ste: straight-through; sigmoid: a periodic sum of logistic steps; "
        "sigmoid-local: one logistic step in each code; dsq: tanh steps (sigmoid-local at twice the temperature).",
    )
    temperature: float = Field(
        4.0,
        gt=0,
        le=100,
        description="Steepness of the estimator's steps, per code; towards 0 the estimator becomes ste.",
    )
    temperature_end: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Temperature at the end of training, reached linearly; unset: the temperature is constant.",
    )
    clamp: Literal["hard", "softclamp"] = Field(
        "hard",
        description="Gradient of clamping to the grid. hard: zero beyond the ends; softclamp: that of smooth ramps "
        "around them.",
    )
    gate: Literal["logistic", "gaussian"] = Field("logistic", description="Shape of the ramps of softclamp.")
    sharpness: float = Field(
        4.0, gt=0, le=1000, description="Steepness of the ramps of softclamp, per code; 2-bit grids need 4 or more."
    )
    scale_gradient: Literal["plain", "lsq"] = Field(
        "plain",
        description="Gradient of scales. plain: unchanged; lsq: divided by the root of group size times highest level.",
    )
    forward: Literal["hard", "soft"] = Field(
        "hard",
        description="Weight in the forward pass. hard: the rounded weight that is saved; soft: the estimator's smooth "
        "values.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        needs: dict[str, str] = {}
        if self.estimator == "ste":
            needs |= dict.fromkeys(("temperature", "temperature_end"), "an estimator other than ste")
        if self.clamp == "hard":
            needs |= dict.fromkeys(("gate", "sharpness"), "clamp: softclamp")
        idle = [key for key in needs if getattr(self, key) != type(self).model_fields[key].default]
        if idle:
            raise ValueError("; ".join(f"{key} acts only with {needs[key]}: leave it out" for key in idle))
        if self.forward == "soft" and self.estimator == "ste":
            raise ValueError(
                "forward: soft needs an estimator other than ste; the smooth form of ste does not round at all"
            )
        least = 2 * OVERSHOOT[self.gate]
        if self.forward == "soft" and self.clamp == "softclamp" and self.sharpness <= least:
            raise ValueError(
                f"forward: soft with sharpness {self.sharpness:g} passes the ends of the grid by half a code, and so "
                f"rounds to a code outside the grid; use a sharpness above {least:.2f}, or forward: hard"
            )
        return self

    def at(self, share: float) -> Self:
        """Return a copy with the temperature that holds after ``share`` (0 .. 1) of training."""
        if self.temperature_end is None:
            return self
        temperature = self.temperature + share * (self.temperature_end - self.temperature)
        return self.model_copy(update={"temperature": temperature, "temperature_end": None})


class OptimConfig(Section):
    """The optimizer and the learning rate schedule."""

    optimizer: Literal["adamw", "adamw8bit", "signsgd", "lion"] = Field(
        "adamw",
        description="adamw8bit: AdamW with 8-bit states, needs bitsandbytes; signsgd: each step has the size of the "
        "learning rate, against the sign of the gradient; lion: the same, against the sign of an average of gradients.",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999),
        description="AdamW: decay rates of the averages of the gradient and its square. lion: shares of the momentum "
        "in a step, and of the old momentum in the new one.",
    )
    eps: float = Field(1e-8, gt=0, description="Epsilon of AdamW, added to the root of the averaged squared gradient.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay of the learning rates after the warm-up."
    )
    final_share: float = Field(0.05, ge=0, le=1, description="Learning rate at the end, as a share of the highest.")
    warmup_share: float = Field(
        0.0, ge=0, le=1, description="Share of the steps in which the learning rates rise linearly."
    )
    max_grad_norm: float | None = Field(
        None, gt=0, description="Clip the norm of all gradients together to this; unset: no clipping."
    )
    accumulation: int = Field(
        1,
        ge=1,
        description="Gradient accumulation: process a step's batch in this many parts. Saves memory; same result.",
    )


def _over(default: Any, given: Any) -> Any:
    """Return ``given``; if both are sections, keys that ``given`` lacks keep their value in ``default``."""
    if not isinstance(default, dict) or not isinstance(given, dict):
        return given
    return default | {name: _over(default.get(name), value) for name, value in given.items()}


Presets = Mapping[str, Mapping[str, Any]]  # light and best -> keys, nested as in a recipe; "data" has keys of data
Preset = Literal["light", "default", "best"]


def preset_field(presets: Presets) -> Any:
    """Return the field ``preset`` of a method whose ``presets`` these are, with a description that lists their keys."""
    light, best = (", ".join(_listed(presets[name])) for name in ("light", "best"))
    return Field(
        "default",
        description=f"Length of the training, where its keys are not given. light takes about a quarter of the time of "
        f"default ({light}); best takes four to five times as long ({best}).",
    )


def _listed(keys: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield ``key value`` for each key, with dots between the names of nested ones."""
    for name, value in keys.items():
        if isinstance(value, Mapping):
            yield from _listed(value, f"{before}{name}.")
        else:
            yield f"{before}{name} {value:g}"


def _without_steps(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a preset, without ``steps`` where the recipe gives ``epochs``, which they would replace."""
    kept = {name: value for name, value in chosen.items() if name != "steps" or "epochs" not in given}
    return {
        name: _without_steps(value, given[name])
        if isinstance(value, Mapping) and isinstance(given.get(name), Mapping)
        else value
        for name, value in kept.items()
    }


class PresetConfig(MethodConfig):
    """The base of the section of a method with presets, names for a shorter and a longer training.

    A subclass sets ``presets`` and ``preset = preset_field(presets)``. Keys that a recipe gives replace the preset's.
    """

    presets: ClassVar[Presets] = {}
    preset: Preset = Field("default", description="Length of the training.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Fill keys that are left out: from the preset, and in a section that is given from this method's defaults."""
        if not isinstance(values, dict):
            return values
        name = values.get("preset")
        chosen = cls.presets.get(name, {}) if isinstance(name, str) else {}
        values = _over(_without_steps({key: value for key, value in chosen.items() if key != "data"}, values), values)
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        own = {name: value.model_dump() for name, value in defaults.items() if isinstance(value, Section)}
        return {name: _over(own[name], value) if name in own else value for name, value in values.items()}

    @property
    def data_defaults(self) -> dict[str, int]:
        """Defaults of the data section that the preset sets."""
        return dict(self.presets.get(self.preset, {}).get("data", {}))


class TrainedConfig(PresetConfig):
    """The base of the section of every method that trains weights or scales by their gradients."""

    rounding: RoundingConfig = Field(RoundingConfig(), description="Gradient of rounding and clamping.")
    init_from: str | None = Field(
        None,
        description="Folder of a native checkpoint of the same model and grid to start training from; unset: start "
        "from the float weights.",
    )


class LastBlockConfig(MethodConfig):
    """The base of the section of a method that trains a block at a time."""

    last_block_loss: Literal["mse", "kl"] = Field(
        "mse",
        description="Loss of the last block. mse: squared difference of its outputs, relative to the sizes of tokens "
        "and channels, as in the other blocks; kl: KL divergence of the model's predictions from the float model's, "
        "through the final norm and the output head; this loss has no end-loss weights, so guided weighs the other "
        "blocks alone.",
    )


DISTANCE_BLOCKS = 4  # decoder blocks of a model in which distances of an end-to-end training are those of the recipe
OF_DEPTH = f"In a model of n > {DISTANCE_BLOCKS} decoder blocks it is {DISTANCE_BLOCKS}/n of this value."


class EndToEndConfig(Section):
    """Training of the whole model on text: loss, duration, optimizer and validation."""

    renamed: ClassVar[Mapping[str, str]] = {"tracker": "a section of the recipe: write tracker: NAME beside method"}

    loss: Literal["ce", "kl", "reverse-kl", "mixed", "topk-kl", "cakld", "hidden"] = Field(
        "kl",
        description="Training loss. ce: next-token cross entropy. The others compare with the float model, which is "
        "then in memory as well: kl: KL divergence; reverse-kl; mixed: kl and ce; topk-kl: kl of the most "
        "probable tokens; cakld: kl and reverse-kl, weighted by the float model's confidence; hidden: squared "
        "difference of the final hidden states, as a share of their mean square, without the output head.",
    )
    temperature: float = Field(1.0, gt=0, description="Divisor of both models' logits before a divergence.")
    ce_share: float = Field(0.5, ge=0, le=1, description="Weight of ce in the loss mixed; kl has the rest.")
    top_k: int = Field(
        64,
        ge=1,
        description="Number of most probable tokens that the loss topk-kl compares; all others count as one class.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the calibration windows.")
    steps: int | None = Field(
        None, ge=0, description="Number of training steps, in place of epochs; unset: epochs decides."
    )
    min_steps: int = Field(
        32,
        ge=0,
        description="Minimum number of steps, if epochs gives fewer: the windows are then used again. A step never "
        "moves parameters further than in a training of this many; 0: no minimum.",
    )
    batch_size: int = Field(
        4, ge=1, description="Windows per step, over all processes and accumulation parts together."
    )
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and learning rate schedule.")
    gradient_checkpointing: bool = Field(
        False, description="Run each block a second time in the backward pass: less memory, more time, same result."
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="State of the model in several processes. none: each process holds a full copy; full: parameters, "
        "gradients, optimizer states and frozen weights are sharded (FSDP2).",
    )
    validation_samples: int | None = Field(
        None,
        ge=0,
        description="Windows kept out of training, on which the best state is chosen, the start included; 0: keep the "
        "last state; unset: 0, or if there are fewer steps than min_steps one window in eight, at least 1 and at most "
        "8.",
    )
    validate_every: int | None = Field(
        None,
        ge=0,
        description="Steps between validations; 0: only before and after training; unset: an eighth of the steps.",
    )
    save_every: int = Field(
        100,
        ge=0,
        description="Steps between saved training states, from which a killed run goes on; 0: save only at the end.",
    )

    @model_validator(mode="after")
    def _validation_has_windows(self) -> Self:
        if self.validate_every and not self.validation_samples:
            raise ValueError("validate_every needs validation_samples, the number of windows to keep out of training")
        return self

    @model_validator(mode="after")
    def _hidden_states_are_whole(self) -> Self:
        if self.loss == "hidden" and self.sharding == "full":
            raise ValueError(
                "loss: hidden compares hidden states that a model sharded by sharding: full does not keep; use another "
                "loss, or sharding: none"
            )
        return self


class EndToEnd(EndToEndConfig, TrainedConfig):
    """The base of the section of a method that trains all linears at once."""

    # light keeps min_steps: with a quarter of the steps, each four times as long, the model is lost
    presets: ClassVar[Presets] = {
        "light": {"steps": 8, "validation_samples": 2},
        "best": {"epochs": 4, "min_steps": 128},
    }
    preset: Preset = preset_field(presets)


class WeightsConfig(EndToEnd):
    """The base of the section of a method that trains the weights of all linears at once.

    Learning rates follow from the model and the number of steps: Adam's steps have the size of the learning rate, so a
    weight whose gradient keeps its sign moves by ``travel`` quantization steps in the whole training, however long, and
    by less if there are fewer steps than ``min_steps``.
    """

    travel: float = Field(
        0.2,
        ge=0,
        description="Distance that a weight can move over all steps, in quantization steps; sets its learning rate. "
        + OF_DEPTH,
    )
    lr: float | None = Field(
        None, ge=0, description="Learning rate of weights, in place of travel; unset: travel decides."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of weights, decoupled from the gradient.")


class GridConfig(WeightsConfig):
    """The base of the section of a method that also trains scales and zero points."""

    scale_travel: float = Field(
        0.15,
        ge=0,
        description="Distance that the ends of a range can move over all steps, in quantization steps; sets the "
        "learning rate of scales and zero points. " + OF_DEPTH,
    )
    scale_lr: float | None = Field(
        None,
        ge=0,
        description="Learning rate of scales and zero points, in place of scale_travel; unset: scale_travel decides.",
    )
