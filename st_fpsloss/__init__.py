"""Two-tower retrieval models from click logs, for sentence-transformers."""

from typing import TYPE_CHECKING

from st_fpsloss.utils.lazy import lazy

__version__ = "0.2.0"

if TYPE_CHECKING:
    from st_fpsloss.evaluation import RetrievalEvaluator
    from st_fpsloss.losses import FPSLoss, FullSoftmaxLoss, PairCELoss, SampledSoftmaxLoss, SigmoidLoss, TripletLoss
    from st_fpsloss.retrieval import DocumentIndex
    from st_fpsloss.towers import (
        Categorical,
        DocumentHistory,
        History,
        Numerical,
        Tags,
        Tower,
        freeze_unused_parameters,
        history_documents,
        two_tower,
    )
    from st_fpsloss.training import LossStateCallback, align_towers, last_complete_checkpoint
else:
    # Each where it is first used: to encode a query without torch must not import torch.
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "evaluation": ["RetrievalEvaluator"],
            "losses": [
                "FPSLoss",
                "FullSoftmaxLoss",
                "PairCELoss",
                "SampledSoftmaxLoss",
                "SigmoidLoss",
                "TripletLoss",
            ],
            "retrieval": ["DocumentIndex"],
            "towers": [
                "Categorical",
                "DocumentHistory",
                "History",
                "Numerical",
                "Tags",
                "Tower",
                "freeze_unused_parameters",
                "history_documents",
                "two_tower",
            ],
            "training": ["LossStateCallback", "align_towers", "last_complete_checkpoint"],
        },
    )

__all__ = [
    "Categorical",
    "DocumentHistory",
    "DocumentIndex",
    "FPSLoss",
    "FullSoftmaxLoss",
    "History",
    "LossStateCallback",
    "Numerical",
    "PairCELoss",
    "RetrievalEvaluator",
    "SampledSoftmaxLoss",
    "SigmoidLoss",
    "Tags",
    "Tower",
    "TripletLoss",
    "align_towers",
    "freeze_unused_parameters",
    "history_documents",
    "last_complete_checkpoint",
    "two_tower",
]
