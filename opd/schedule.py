"""What changes from step to step of a stage: learning rate and weight of multi-token prediction. Pure functions."""

from __future__ import annotations

from opd.config import StageConfig


def learning_rate_at(step: int, stage: StageConfig, total_steps: int) -> float:
    """Of step 0, 1, ...: from a tenth up over `warmup_steps`, constant, and over the last `decay_fraction` of the steps
    down to a tenth, which the last step has."""
    rate = stage.learning_rate
    if step < stage.warmup_steps:
        rate *= 0.1 + 0.9 * step / stage.warmup_steps
    decay_steps = round(stage.decay_fraction * total_steps)
    into_decay = step - (total_steps - decay_steps) + 1
    if decay_steps and into_decay > 0:
        rate *= 1.0 - 0.9 * min(1.0, into_decay / decay_steps)
    return rate


def mtp_weight_at(step: int, stage: StageConfig, total_steps: int) -> float:
    """Of multi-token prediction at step 0, 1, ...: a third of `mtp_weight` once the learning rate decays."""
    is_decaying = step >= total_steps - round(stage.decay_fraction * total_steps)
    return stage.mtp_weight / 3 if is_decaying else stage.mtp_weight
