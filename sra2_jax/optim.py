"""The optimizer: AdamW behind a global-norm clip, constant rate after a warm-up."""

import optax


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate as a function of the step."""
    schedule = optax.constant_schedule(learning_rate)
    if warmup_steps > 1:  # step 0 already moves, by 1 / warmup_steps of the rate
        schedule = optax.linear_schedule(
            learning_rate / warmup_steps, learning_rate, warmup_steps - 1
        )
    transform = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay),
    )
    return transform, schedule
