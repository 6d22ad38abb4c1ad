"""The losses that a user picks."""

from st_fpsloss.losses.fps import FPSLoss

__all__ = ["FPSLoss"]
