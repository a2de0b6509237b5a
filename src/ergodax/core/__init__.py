"""Drivers and vocabulary: paths, predictions, the sampler term, scan drivers, training, sweeps, the run shell. Knows no method."""

from .loop import integrate as integrate, iterate as iterate
from .path import (
    AffinePath as AffinePath,
    CosinePath as CosinePath,
    EDMPath as EDMPath,
    FlowMatchingPath as FlowMatchingPath,
    SubVPPath as SubVPPath,
    VEPath as VEPath,
    VPPath as VPPath,
)
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
from .term import DenoiserTerm as DenoiserTerm, Posterior as Posterior, Step as Step, with_noise as with_noise
