"""Lightning callbacks: averages, evaluation, pictures, logs and checkpoints."""

from cm_lightning.callbacks.checkpoints import CheckpointCallback, checkpoints_of, newest_intact
from cm_lightning.callbacks.diagnostics import DiagnosticsCallback
from cm_lightning.callbacks.ema import EMACallback, find_ema
from cm_lightning.callbacks.fid import FIDCallback
from cm_lightning.callbacks.guard import GuardCallback
from cm_lightning.callbacks.performance import PerformanceCallback
from cm_lightning.callbacks.progress import KimgProgress
from cm_lightning.callbacks.run_record import RunRecordCallback
from cm_lightning.callbacks.samples import SamplesCallback
from cm_lightning.callbacks.step import StepCallback
from cm_lightning.callbacks.target_network import TargetNetworkCallback
from cm_lightning.callbacks.weight_normalization import WeightNormalizationCallback

__all__ = [
    "CheckpointCallback",
    "DiagnosticsCallback",
    "EMACallback",
    "FIDCallback",
    "GuardCallback",
    "KimgProgress",
    "PerformanceCallback",
    "RunRecordCallback",
    "SamplesCallback",
    "StepCallback",
    "TargetNetworkCallback",
    "WeightNormalizationCallback",
    "checkpoints_of",
    "find_ema",
    "newest_intact",
]
