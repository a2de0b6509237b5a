"""Laws that predict losses: of curves from schedules, of runs from sizes, with fits, uncertainty and optimal choices."""

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
