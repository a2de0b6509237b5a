"""Optimisers, as `optax.GradientTransformation`."""

from .shb_step_decay import (
    HeavyBallState as HeavyBallState,
    heavy_ball as heavy_ball,
    heavy_ball_momentum as heavy_ball_momentum,
    heavy_ball_step_decay as heavy_ball_step_decay,
    step_decay as step_decay,
)
