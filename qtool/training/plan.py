"""The plan of an end-to-end training: its steps, the windows held out for validation, and the size of its steps.

Adam's first step has the size of the learning rate in every weight at once, however small the gradient, and all these
moves add up in the outputs. A travel of a fifth of a quantization step is useful over 32 steps; over 2 steps each is so
long that the model is lost (docs/benchmarks.md). So a budget of fewer steps than ``min_steps`` is a short training: its
windows are used again until there are ``min_steps``, no step is longer than in a training of ``min_steps``, and some
windows are held out, on which the best state is chosen.
"""

from math import ceil
from typing import NamedTuple

from qtool.config.training import EndToEndConfig
from qtool.system.errors import InputError
from qtool.training.fit import total_factor

HELD_OUT = 8  # of a short training, one window in this many is held out, and at most this many
NUM_CHECKS = 8  # number of states that are compared with the start, unless validate_every is set
MAX_STEPS = 10**6  # most steps of a training; the learning rates of all are summed before it begins


class Plan(NamedTuple):
    """What follows from the keys of a training and the number of its calibration windows."""

    num_steps: int
    num_trained: int  # windows to train on, the first ones
    num_held_out: int  # windows to validate on, the last ones; 0: the last state is kept
    validate_every: int  # steps between validations; 0: only before and after training
    total: float  # sum of the schedule's factors, of min_steps steps or more; see rates.end_to_end_total
    notes: tuple[str, ...] = ()  # what a user should know of a short training


def plan_of(config: EndToEndConfig, num_windows: int, where: str = "method") -> Plan:
    """Return the plan of a training on ``num_windows`` windows; ``where`` is the section of its keys in the recipe.

    Raises:
        InputError: Validation leaves no window to train on, or there are too many steps.
    """
    asked = config.steps
    if asked is None:
        windows = config.epochs * max(0, num_windows - (config.validation_samples or 0))
        asked = ceil(round(windows / config.batch_size, 6))  # a product such as 0.7 * 10 is above 7
    short = 0 < asked < config.min_steps
    held = config.validation_samples
    if held is None:
        held = min(HELD_OUT, max(1, num_windows // HELD_OUT)) if short else 0
    if held >= num_windows:
        raise InputError(_too_few(config, num_windows, where))
    steps = config.min_steps if short and config.steps is None else asked
    if max(steps, config.min_steps) > MAX_STEPS:
        raise InputError(
            f"{where}: the training has {max(steps, config.min_steps):,} steps; at most {MAX_STEPS:,} are taken. "
            "Lower steps, min_steps, epochs or data.num_samples, or raise batch_size"
        )
    every = ceil(steps / NUM_CHECKS) if config.validate_every is None else config.validate_every
    total = total_factor(max(steps, config.min_steps), config.optim)
    notes = (_short(config, asked, num_windows, held),) if short else ()
    return Plan(steps, num_windows - held, held, every, total, notes)


def _too_few(config: EndToEndConfig, num_windows: int, where: str) -> str:
    """Return why a training is refused whose validation leaves no window to train on."""
    if config.validation_samples is not None:
        return (
            f"{where}.validation_samples {config.validation_samples} of {num_windows} windows leave none to train on; "
            "lower it, or raise data.num_samples"
        )
    return (
        f"{num_windows} calibration window is too little text to train on: the best state is chosen on another window, "
        f"so 2 are needed at least. Raise data.num_samples, or set {where}.validation_samples to 0 to train without "
        "validation"
    )


def _short(config: EndToEndConfig, asked: int, num_windows: int, held: int) -> str:
    """Return the note on a training of ``asked`` steps, fewer than ``min_steps``."""
    validated = f"the best state is chosen on {held} of {num_windows} windows" if held else "nothing is validated"
    if config.steps is not None:
        return (
            f"{asked} steps are fewer than min_steps ({config.min_steps}): learning rates are those of "
            f"{config.min_steps} steps, so parameters move less; {validated}"
        )
    return (
        f"{num_windows} windows make {asked} training steps, fewer than min_steps ({config.min_steps}): they are used "
        f"again until there are {config.min_steps}; {validated}"
    )
