r"""Embed documents with a model into a search index.

Documents are texts, or JSON objects with "text" and side features. Equal documents without ids are one.

Examples:
    st-fpsloss index --model runs/shop --index runs/shop/index \
        --documents products.parquet --document_column title --id_column sku

    st-fpsloss index --model runs/films --trust_remote_code --index runs/films-index \
        --documents data/movielens/documents.jsonl
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from st_fpsloss.cli.data import check_source_column, source_names, source_of
from st_fpsloss.cli.models import load_model
from st_fpsloss.cli.parser import parse
from st_fpsloss.data import load_inputs
from st_fpsloss.data.inputs import canonical_string
from st_fpsloss.retrieval import DocumentIndex

ID_COLUMN = "id"


@dataclass
class Options:
    """What to index, and where."""

    model: str = field(metadata={"help": "folder or Hub id of the model"})
    index: Path = field(metadata={"help": "folder of the index, to be written"})
    documents: list[str] = field(metadata={"help": "files or Hub id of the documents"})
    document_column: str = field(default="document", metadata={"help": "column of the documents"})
    id_column: str | None = field(
        default=None,
        metadata={"help": f"column of their ids (default: {ID_COLUMN}, else numbers of rows)"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    dataset_split: str = field(default="train", metadata={"help": "split of a data set on the Hub"})
    encoding: str = field(default="utf-8", metadata={"help": "of text files"})
    factory: str = field(default="Flat", metadata={"help": "kind of FAISS index; Flat is exact"})
    overwrite: bool = field(default=False, metadata={"help": "replace the index that is there"})
    batch_size: int = field(default=32, metadata={"help": "inputs in one forward pass"})
    trust_remote_code: bool = field(default=False, metadata={"help": "needed for a model with features or a bias"})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    (options,) = parse(__doc__, (Options,), argv, prog="st-fpsloss index")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = source_of(options.documents, options.dataset_config, options.dataset_split)
    documents = read_documents(source, options.document_column, options.id_column, options.encoding)
    model = load_model(options.model, options.trust_remote_code)
    index = DocumentIndex.build(
        model, documents, options.index, options.factory, options.batch_size, overwrite=options.overwrite
    )
    print(f"{len(index.ids)} documents are in {options.index}.")


def read_documents(
    source: list[str] | Dataset, column: str, id_column: str | None, encoding: str = "utf-8"
) -> dict[Any, Any]:
    """Reads documents by their ids; without a column of ids, by the number of the first row that each stands in."""
    check_source_column(source, column, "--document_column", encoding)
    if id_column is not None:
        check_source_column(source, id_column, "--id_column", encoding)
    elif ID_COLUMN in source_names(source, encoding=encoding) and column != ID_COLUMN:
        id_column = ID_COLUMN
    documents = load_inputs(source, column, id_column, encoding)
    if id_column is not None:
        return documents
    first_row: dict[str, int] = {}
    for row, document in documents.items():
        first_row.setdefault(canonical_string(document), row)
    return {row: documents[row] for row in first_row.values()}
