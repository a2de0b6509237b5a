"""Diffusion and flow models: solvers, grids, guidance, objectives. Paths, parametrisations and the driver are in `ergodax.core`."""

from .ancestral import Ancestral as Ancestral
from .ddim import DDIM as DDIM
from .dpm_solver_pp import DPMSolverPP2M as DPMSolverPP2M
from .euler_maruyama import EulerMaruyama as EulerMaruyama
from .grids import (
    karras_grid as karras_grid,
    log_snr_grid as log_snr_grid,
    quadratic_grid as quadratic_grid,
    uniform_grid as uniform_grid,
)
from .guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from .heun import Heun as Heun
from .immiscible_diffusion import Immiscible as Immiscible, immiscible_assignment as immiscible_assignment
from .min_snr import MinSNR as MinSNR
from .objective import DenoisingLoss as DenoisingLoss, uniform_weight as uniform_weight
from .score_sde import ReverseDiffusion as ReverseDiffusion
from .solver import DenoiserSolver as DenoiserSolver, NoisyDenoiserSolver as NoisyDenoiserSolver
