"""Rules of early stopping for `ergodax.core.search`: which runs of a sweep go on, stop, or copy another."""

from .asynchronous_halving import AsynchronousHalving as AsynchronousHalving
from .population_based_training import Perturb as Perturb, PopulationBasedTraining as PopulationBasedTraining, Resample as Resample
from .successive_halving import SuccessiveHalving as SuccessiveHalving
