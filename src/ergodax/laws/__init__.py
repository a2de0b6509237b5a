"""Laws that predict losses: of curves from schedules, of runs from sizes, with fits, uncertainty and optimal choices."""

from .curves import (
    LossCurve as LossCurve,
    RateHistory as RateHistory,
    curve_features as curve_features,
    curve_numbers as curve_numbers,
    histories_of as histories_of,
    interpolate_rates as interpolate_rates,
    loss_curve as loss_curve,
    losses_of as losses_of,
    optimise_rates as optimise_rates,
    rate_history as rate_history,
)
from .fitting import (
    LawFit as LawFit,
    Objective as Objective,
    bands as bands,
    bootstrap as bootstrap,
    fit_law as fit_law,
    huber as huber,
    huber_log as huber_log,
    squared as squared,
    squared_log as squared_log,
    stack_laws as stack_laws,
)
from .infinite_compute_asymptote import (
    NestedAsymptotes as NestedAsymptotes,
    data_efficiency as data_efficiency,
    ensemble_losses as ensemble_losses,
    fit_nested_asymptotes as fit_nested_asymptotes,
)
from .loss_to_loss import (
    LossToLoss as LossToLoss,
    LossToLossFit as LossToLossFit,
    fit_loss_to_loss as fit_loss_to_loss,
    fit_surface as fit_surface,
)
from .lr_annealing_law import (
    AnnealingLaw as AnnealingLaw,
    SizedAnnealingLaw as SizedAnnealingLaw,
    annealing_area as annealing_area,
    fit_annealing_law as fit_annealing_law,
    fit_sized_annealing_law as fit_sized_annealing_law,
)
from .multi_power_law import (
    CrossValidation as CrossValidation,
    MultiPowerLaw as MultiPowerLaw,
    ShapePrior as ShapePrior,
    cross_validated_fit as cross_validated_fit,
    early_stopped_fit as early_stopped_fit,
    fit_multi_power_law as fit_multi_power_law,
    rough_law as rough_law,
)
from .power_law import (
    AdditiveSurface as AdditiveSurface,
    CompoundSurface as CompoundSurface,
    OffsetPowerLaw as OffsetPowerLaw,
    PowerLaw as PowerLaw,
    batch_size_of_loss as batch_size_of_loss,
)
from .power_lines import (
    BatchTokens as BatchTokens,
    adamw_timescale as adamw_timescale,
    average_weights as average_weights,
    optimal_weight_decay as optimal_weight_decay,
    sweep_optimum as sweep_optimum,
    weight_decay as weight_decay,
)
