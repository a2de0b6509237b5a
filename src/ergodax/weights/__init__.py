"""Rules on weights: pure functions from pytrees to pytrees."""

from .wsm import (
    WSM as WSM,
    RingState as RingState,
    decay_to_merge as decay_to_merge,
    inverse_sqrt_decay as inverse_sqrt_decay,
    merge as merge,
    merge_coefficients as merge_coefficients,
    merge_stacked as merge_stacked,
    merge_to_decay as merge_to_decay,
)
