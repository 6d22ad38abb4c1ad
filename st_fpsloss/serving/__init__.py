"""From a trained model to answers: the query tower without torch, and the HTTP server of ``st-fpsloss serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from st_fpsloss.utils.lazy import lazy

if TYPE_CHECKING:
    from st_fpsloss.serving.export import export_query_encoder
    from st_fpsloss.serving.query_encoder import QueryEncoder
else:
    __getattr__, __dir__ = lazy(__name__, {"export": ["export_query_encoder"], "query_encoder": ["QueryEncoder"]})

__all__ = [
    "QueryEncoder",
    "export_query_encoder",
]
