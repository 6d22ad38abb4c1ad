"""The losses that a user picks: each says which rows it needs and what is to be learned from their embeddings."""

from st_fpsloss.losses.fps import FPSLoss
from st_fpsloss.losses.full_softmax import FullSoftmaxLoss
from st_fpsloss.losses.pair_ce import PairCELoss
from st_fpsloss.losses.sampled_softmax import SampledSoftmaxLoss
from st_fpsloss.losses.sigmoid import SigmoidLoss
from st_fpsloss.losses.triplet import TripletLoss

__all__ = [
    "FPSLoss",
    "FullSoftmaxLoss",
    "PairCELoss",
    "SampledSoftmaxLoss",
    "SigmoidLoss",
    "TripletLoss",
]
