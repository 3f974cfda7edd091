"""Samplers: plain functions of a denoiser and noise, without Lightning."""

from cm_lightning.sampling.consistency import check_sigmas, image_noise, multistep, phased
from cm_lightning.sampling.guidance import GuidedDenoiser
from cm_lightning.sampling.numbered import draw_images, draw_labels, evaluating
from cm_lightning.sampling.ode import euler, heun
from cm_lightning.sampling.samplers import (
    DEFAULT_SAMPLERS,
    EulerSampler,
    HeunSampler,
    MultistepSampler,
    PhasedSampler,
    Sampler,
    check_phases,
    check_samplers,
)
from cm_lightning.sigmas import karras_sigmas

__all__ = [
    "DEFAULT_SAMPLERS",
    "EulerSampler",
    "GuidedDenoiser",
    "HeunSampler",
    "MultistepSampler",
    "PhasedSampler",
    "Sampler",
    "check_phases",
    "check_samplers",
    "check_sigmas",
    "draw_images",
    "draw_labels",
    "euler",
    "evaluating",
    "heun",
    "image_noise",
    "karras_sigmas",
    "multistep",
    "phased",
]
