"""Drivers and vocabulary: paths, predictions, the sampler term, scan drivers, training, sweeps, searches, the run shell. Knows no method."""

from . import space as space
from .adapt import FromFunction as FromFunction, from_linen as from_linen, from_nnx as from_nnx
from .batch import given_pairs as given_pairs, stratified_times as stratified_times, uniform_times as uniform_times
from .fit import Fit as Fit, FitState as FitState, Fitted as Fitted, fit as fit
from .likelihood import (
    AugmentedVelocity as AugmentedVelocity,
    ExactDivergence as ExactDivergence,
    HutchinsonDivergence as HutchinsonDivergence,
    TimeReversed as TimeReversed,
    log_likelihood as log_likelihood,
    standard_normal_log_prob as standard_normal_log_prob,
)
from .loop import integrate as integrate, iterate as iterate
from .mesh import DataParallel as DataParallel, FullySharded as FullySharded, initialise as initialise, replicated as replicated
from .path import (
    AffinePath as AffinePath,
    CosinePath as CosinePath,
    EDMPath as EDMPath,
    FlowMatchingPath as FlowMatchingPath,
    SubVPPath as SubVPPath,
    VEPath as VEPath,
    VPPath as VPPath,
)
from .population import AbstractRule as AbstractRule, Decision as Decision, Lanes as Lanes, Trial as Trial, fit_trial as fit_trial
from .prediction import (
    DataPrediction as DataPrediction,
    Denoiser as Denoiser,
    EDMInput as EDMInput,
    EDMPrediction as EDMPrediction,
    NoisePrediction as NoisePrediction,
    Prediction as Prediction,
    ProbabilityFlow as ProbabilityFlow,
    ScorePrediction as ScorePrediction,
    VelocityPrediction as VelocityPrediction,
    VPrediction as VPrediction,
)
from .replay import Replayed as Replayed, replay as replay
from .result import Group as Group, SweepResult as SweepResult
from .search import SearchResult as SearchResult, search as search
from .space import grid as grid, traced as traced
from .sweep import sweep as sweep
from .term import DenoiserTerm as DenoiserTerm, Posterior as Posterior, Step as Step, with_noise as with_noise
