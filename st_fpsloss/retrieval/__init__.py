"""Nearest-neighbour search over documents that are embedded once."""

from st_fpsloss.retrieval.index import DocumentIndex

__all__ = [
    "DocumentIndex",
]
