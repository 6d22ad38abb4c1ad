"""Which encoder reads which kind of side feature."""

from __future__ import annotations

from st_fpsloss.towers.features.kinds import Categorical, DocumentHistory, Feature, History, Numerical, Tags
from st_fpsloss.towers.modules.document_history import DocumentHistoryEncoder
from st_fpsloss.towers.modules.feature_encoders import (
    CategoricalEncoder,
    FeatureEncoder,
    HistoryEncoder,
    NumericalEncoder,
    RecencyEncoder,
    TagsEncoder,
)


def encoder_of(feature: Feature) -> FeatureEncoder:
    """Returns a new encoder for a feature."""
    if isinstance(feature, History):
        return HistoryEncoder(feature) if feature.num_hidden_layers else RecencyEncoder(feature)
    kinds: dict[type[Feature], type[FeatureEncoder]] = {
        Categorical: CategoricalEncoder,
        DocumentHistory: DocumentHistoryEncoder,
        Numerical: NumericalEncoder,
        Tags: TagsEncoder,
    }
    return kinds[type(feature)](feature)
