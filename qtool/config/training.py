"""The sections of a recipe that methods share which train: rounding, optimizer, and training of the whole model."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qtool.config.sections import MethodConfig, Section

OVERSHOOT = {"logistic": 0.2785, "gaussian": 0.1700}  # how far a soft clamp passes its end, times its sharpness


class RoundingConfig(Section):
    """What training takes for the gradient of rounding and clamping; the weight that it ships is the same under all."""

    estimator: Literal["ste", "sigmoid", "sigmoid-local", "dsq"] = Field(
        "ste",
        description="Gradient of rounding: straight through; of a periodic sum of logistic steps; of one logistic step "
        "in each code; or of steps of tanh (sigmoid-local at twice the temperature).",
    )
    temperature: float = Field(
        4.0, gt=0, le=100, description="Steepness of the estimator's steps, per code; towards 0 it becomes ste."
    )
    temperature_end: float | None = Field(
        None, gt=0, le=100, description="Temperature at the end of training, reached linearly; unset: constant."
    )
    clamp: Literal["hard", "softclamp"] = Field(
        "hard", description="Gradient at the ends of the grid: zero beyond them, or that of smooth ramps around them."
    )
    gate: Literal["logistic", "gaussian"] = Field("logistic", description="Shape of the ramps of softclamp.")
    sharpness: float = Field(
        4.0, gt=0, le=1000, description="Steepness of the ramps of softclamp, per code; 2 bits want 4 or more."
    )
    scale_gradient: Literal["plain", "lsq"] = Field(
        "plain", description="Gradient of scales as it is, or divided by the root of group size times highest level."
    )
    forward: Literal["hard", "soft"] = Field(
        "hard", description="hard: train on the weight that is shipped; soft: on the estimator's own smooth values."
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
            raise ValueError("forward: soft needs an estimator other than ste, whose smooth form does not round at all")
        least = 2 * OVERSHOOT[self.gate]
        if self.forward == "soft" and self.clamp == "softclamp" and self.sharpness <= least:
            raise ValueError(
                f"forward: soft with sharpness {self.sharpness:g} passes the ends of the grid by half a code, which "
                f"rounds to a code that is not there; use a sharpness above {least:.2f}, or forward: hard"
            )
        return self

    def at(self, share: float) -> Self:
        """The same with the temperature that holds after ``share`` (0 .. 1) of training."""
        if self.temperature_end is None:
            return self
        temperature = self.temperature + share * (self.temperature_end - self.temperature)
        return self.model_copy(update={"temperature": temperature, "temperature_end": None})


class OptimConfig(Section):
    """How parameters follow their gradients."""

    optimizer: Literal["adamw", "adamw8bit", "signsgd"] = Field(
        "adamw", description="adamw8bit needs bitsandbytes; signsgd: steps of the rate itself, by the gradient's sign."
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay of AdamW's averages of gradient and square.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of AdamW's average square.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How learning rates fall after the warm-up."
    )
    final_share: float = Field(0.05, ge=0, le=1, description="Rate at the end, as a share of the rate at the top.")
    warmup_share: float = Field(0.0, ge=0, le=1, description="Share of the steps in which rates rise, linearly.")
    max_grad_norm: float | None = Field(None, gt=0, description="Gradients longer than this are cut; unset: none is.")
    accumulation: int = Field(1, ge=1, description="Parts that a step is worked on in, to save memory; same result.")


def _over(default: Any, given: Any) -> Any:
    """``given``, and where it is a section that says nothing, ``default``."""
    if not isinstance(default, dict) or not isinstance(given, dict):
        return given
    return default | {name: _over(default.get(name), value) for name, value in given.items()}


class TrainedConfig(MethodConfig):
    """The base of the section of every method that trains."""

    rounding: RoundingConfig = Field(RoundingConfig(), description="The gradient of rounding and clamping.")
    init_from: str | None = Field(
        None, description="Folder of a native checkpoint of the same model and grid to start from; unset: the floats."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """A section of which some keys are given keeps this method's own defaults for the others."""
        if not isinstance(values, dict):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        own = {name: value.model_dump() for name, value in defaults.items() if isinstance(value, Section)}
        return {name: _over(own[name], value) if name in own else value for name, value in values.items()}


class EndToEndConfig(Section):
    """Training of the whole model on text: what it lowers, on how much, and how that is watched."""

    loss: Literal["ce", "kl", "reverse-kl", "mixed", "topk-kl", "cakld"] = Field(
        "kl",
        description="ce: next-token cross entropy; the others compare with the float model, which is then held in "
        "memory too: KL divergence, reversed, mixed with ce, of the likeliest tokens, or of both directions by its "
        "confidence.",
    )
    temperature: float = Field(1.0, gt=0, description="Both models' logits are divided by this before a divergence.")
    ce_share: float = Field(0.5, ge=0, le=1, description="Weight of ce in the loss mixed; kl has the rest.")
    top_k: int = Field(64, ge=1, description="Tokens that topk-kl tells apart.")
    epochs: int = Field(1, ge=1, description="How often each calibration window is seen.")
    steps: int | None = Field(None, ge=0, description="Steps of training, whatever epochs says.")
    batch_size: int = Field(4, ge=1, description="Windows in a step, those of all processes and parts together.")
    optim: OptimConfig = Field(OptimConfig(), description="How parameters follow their gradients.")
    gradient_checkpointing: bool = Field(
        False, description="Run each block a second time for its gradient and hold less meanwhile; same result."
    )
    sharding: Literal["none", "full"] = Field(
        "none",
        description="What several processes hold: all of the model each, or of every parameter, gradient, optimizer "
        "state and frozen weight a part (FSDP2).",
    )
    validation_samples: int = Field(
        0, ge=0, description="Windows kept out of training, on which the best state is chosen; 0: the last state is."
    )
    validate_every: int = Field(0, ge=0, description="Steps between validations; 0: only before and after training.")
    save_every: int = Field(100, ge=0, description="Steps after which a killed run loses nothing; 0: only the end.")
    tracker: Literal["auto", "tensorboard", "wandb", "mlflow", "none"] = Field(
        "auto", description="Where losses are sent; auto: tensorboard, in OUT.logs, where that is installed."
    )

    @model_validator(mode="after")
    def _validation_has_windows(self) -> Self:
        if self.validate_every and not self.validation_samples:
            raise ValueError("validate_every needs validation_samples, the number of windows to keep out of training")
        return self


class EndToEnd(TrainedConfig, EndToEndConfig):
    """The base of the section of a method that trains all linears at once."""


class WeightsConfig(EndToEnd):
    """The same of a method that trains their weights: how fast these move.

    Rates follow the model and the budget: a weight whose gradient keeps its sign moves by ``travel`` quantization steps
    in the whole training, whatever that is: Adam's steps have the size of the rate.
    """

    travel: float = Field(0.2, ge=0, description="How far a weight can move in all steps, in quantization steps.")
    lr: float | None = Field(None, ge=0, description="Learning rate of weights, in place of travel.")
    weight_decay: float = Field(0.0, ge=0, description="Of weights, decoupled from the gradient.")


class GridConfig(WeightsConfig):
    """The same of a method that also trains scales and zero points."""

    scale_travel: float = Field(
        0.15, ge=0, description="How far the ends of a range can move in all steps, in quantization steps."
    )
    scale_lr: float | None = Field(
        None, ge=0, description="Learning rate of scales and zero points, in place of scale_travel."
    )
