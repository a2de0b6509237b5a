"""Learning-rate and other schedules, as `optax.Schedule`: `step -> value`. Horizons, rates and shapes may be traced and swept."""

from ..core.schedule import (
    Cooldown as Cooldown,
    cosine_cooldown as cosine_cooldown,
    linear_cooldown as linear_cooldown,
    sqrt_cooldown as sqrt_cooldown,
)
from .autolrs import (
    Forecast as Forecast,
    Probes as Probes,
    RateSearch as RateSearch,
    Stage as Stage,
    Train as Train,
    autolrs_stage as autolrs_stage,
    gaussian_process as gaussian_process,
    stage_lengths as stage_lengths,
    stages_schedule as stages_schedule,
    train_autolrs as train_autolrs,
)
from .classical import (
    cosine_schedule as cosine_schedule,
    decay_schedule as decay_schedule,
    inverse_sqrt_schedule as inverse_sqrt_schedule,
    linear_schedule as linear_schedule,
    one_cycle_schedule as one_cycle_schedule,
    piecewise_schedule as piecewise_schedule,
    polynomial_cooldown as polynomial_cooldown,
    step_schedule as step_schedule,
)
from .convex_schedule_bound import (
    ConvexScheduleBound as ConvexScheduleBound,
    TunedBound as TunedBound,
    matching_parameter as matching_parameter,
    optimise_schedule as optimise_schedule,
)
from .loss_forecast import (
    fit_exponential as fit_exponential,
    forecast_loss as forecast_loss,
    forecast_validation_loss as forecast_validation_loss,
    kept_points as kept_points,
    parabola as parabola,
)
from .refined_schedule import (
    RecordedNorms as RecordedNorms,
    averaging_bound as averaging_bound,
    l1_norm as l1_norm,
    last_iterate_rates as last_iterate_rates,
    median_filtered as median_filtered,
    record_gradient_norms as record_gradient_norms,
    refined_rates as refined_rates,
)
from .rex import rex_cooldown as rex_cooldown, rex_schedule as rex_schedule
from .stablelm2_hybrid_lr import hybrid_schedule as hybrid_schedule
from .tabulated import tabulated_schedule as tabulated_schedule
from .uba_schedule import budget_aware_cooldown as budget_aware_cooldown, budget_aware_schedule as budget_aware_schedule
from .wrappers import cycled as cycled, sampled as sampled, warmed_up as warmed_up
from .wsd import exponential_cooldown as exponential_cooldown, wsd_schedule as wsd_schedule
from .wsd_s import reciprocal_cooldown as reciprocal_cooldown, wsd_s_schedule as wsd_s_schedule
