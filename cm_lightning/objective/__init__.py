"""The loss: its five leaves (discretization, coupling, solver, distance, weighting) together."""

from cm_lightning.objective.coupling import (
    Coupled,
    Coupling,
    Denoise,
    GeneratorCoupling,
    Independent,
    MinibatchOT,
)
from cm_lightning.objective.discretization import (
    Discretization,
    DoublingGrid,
    ECTMapping,
    Grid,
    GrowingGrid,
    KarrasGrid,
    LogNormal,
)
from cm_lightning.objective.distance import L1, L2, Distance, PseudoHuber, SquaredL2
from cm_lightning.objective.lpips import LPIPS
from cm_lightning.objective.objective import Draw, Objective, paired_forward, transport_notes
from cm_lightning.objective.phases import Phases, jump
from cm_lightning.objective.posterior import (
    PosteriorMean,
    ReferenceMean,
    ReferenceSums,
    SampleMean,
    TeacherMean,
    merge_sums,
)
from cm_lightning.objective.solver import Euler, Heun, Solver
from cm_lightning.objective.weighting import EDM, SNR, COut, InverseStep, Uniform, Weighting

__all__ = [
    "EDM",
    "L1",
    "L2",
    "LPIPS",
    "SNR",
    "COut",
    "Coupled",
    "Coupling",
    "Denoise",
    "Discretization",
    "Distance",
    "DoublingGrid",
    "Draw",
    "ECTMapping",
    "Euler",
    "GeneratorCoupling",
    "Grid",
    "GrowingGrid",
    "Heun",
    "Independent",
    "InverseStep",
    "KarrasGrid",
    "LogNormal",
    "MinibatchOT",
    "Objective",
    "Phases",
    "PosteriorMean",
    "PseudoHuber",
    "ReferenceMean",
    "ReferenceSums",
    "SampleMean",
    "Solver",
    "SquaredL2",
    "TeacherMean",
    "Uniform",
    "Weighting",
    "jump",
    "merge_sums",
    "paired_forward",
    "transport_notes",
]
