"""Losses as pure functions: float32 inside, no gradient into targets, invariant to the order of the batch."""

from train.distill.losses.classification import Mixing, classification_losses, mix
from train.distill.losses.feature import FEATURE_LOSSES, feature_loss, weighted_mean
from train.distill.losses.logit import logit_divergences, logit_loss
from train.distill.losses.relational import cosine_similarities, relational_loss
from train.distill.losses.segmentation import IGNORE_INDEX, dice_loss, pixel_cross_entropy, segmentation_loss

__all__ = [
    "FEATURE_LOSSES",
    "IGNORE_INDEX",
    "Mixing",
    "classification_losses",
    "cosine_similarities",
    "dice_loss",
    "feature_loss",
    "logit_divergences",
    "logit_loss",
    "mix",
    "pixel_cross_entropy",
    "relational_loss",
    "segmentation_loss",
    "weighted_mean",
]
