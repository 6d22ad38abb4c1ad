"""The losses that a user picks."""

from st_fpsloss.losses.fps import FPSLoss
from st_fpsloss.losses.pair_ce import PairCELoss
from st_fpsloss.losses.sampled_softmax import SampledSoftmaxLoss
from st_fpsloss.losses.sigmoid import SigmoidLoss
from st_fpsloss.losses.triplet import TripletLoss

__all__ = ["FPSLoss", "PairCELoss", "SampledSoftmaxLoss", "SigmoidLoss", "TripletLoss"]
