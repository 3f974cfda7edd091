"""Reading and writing weights, safely."""

from cm_lightning.modules import allow_modules
from cm_lightning.weights.diffusers import read_diffusers, write_diffusers
from cm_lightning.weights.edm_pickle import LICENCE, EDMNetwork, read_edm_pickle
from cm_lightning.weights.openai import OPENAI_LICENCE, read_openai
from cm_lightning.weights.portable import (
    Loaded,
    Pretrained,
    averages_of,
    build_denoiser,
    check_weights,
    from_pretrained,
    load_weights,
    newest_of,
    read_checkpoint,
    save_weights,
    start_from,
)
from cm_lightning.weights.posthoc import load_posthoc
from cm_lightning.weights.public import is_public, load_public

__all__ = [
    "LICENCE",
    "OPENAI_LICENCE",
    "EDMNetwork",
    "Loaded",
    "Pretrained",
    "allow_modules",
    "averages_of",
    "build_denoiser",
    "check_weights",
    "from_pretrained",
    "is_public",
    "load_posthoc",
    "load_public",
    "load_weights",
    "newest_of",
    "read_checkpoint",
    "read_diffusers",
    "read_edm_pickle",
    "read_openai",
    "save_weights",
    "start_from",
    "write_diffusers",
]
