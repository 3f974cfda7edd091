"""The loss: five leaves (pair law, coupling, solver, distance, weighting) and their assembly."""

from cm_lightning.objective.coupling import Coupled, Coupling, Denoise, Independent
from cm_lightning.objective.discretization import Discretization, ECTMapping, LogNormal
from cm_lightning.objective.distance import L2, Distance, PseudoHuber, SquaredL2
from cm_lightning.objective.objective import Draw, Objective, paired_forward, shared_dropout
from cm_lightning.objective.posterior import PosteriorMean, SampleMean
from cm_lightning.objective.solver import Euler, Solver
from cm_lightning.objective.weighting import EDM, COut, InverseStep, Uniform, Weighting

__all__ = [
    "EDM",
    "L2",
    "COut",
    "Coupled",
    "Coupling",
    "Denoise",
    "Discretization",
    "Distance",
    "Draw",
    "ECTMapping",
    "Euler",
    "Independent",
    "InverseStep",
    "LogNormal",
    "Objective",
    "PosteriorMean",
    "PseudoHuber",
    "SampleMean",
    "Solver",
    "SquaredL2",
    "Uniform",
    "Weighting",
    "paired_forward",
    "shared_dropout",
]
