"""An index in a Qdrant server: ids, vectors and stored columns, searched with a filter.

    python training_scripts/qdrant_server.py --index runs/shop/index --model runs/shop --query "red shoes"

Without --url it runs in this process and in memory, to try it: pip install qdrant-client. A server is started with
`docker run -p 6333:6333 qdrant/qdrant`, and used with --url http://localhost:6333.
"""

from __future__ import annotations

import argparse
import json
import logging
import uuid
from collections.abc import Sequence

from qdrant_client import QdrantClient, models
from sentence_transformers import SentenceTransformer

from st_fpsloss import DocumentIndex
from st_fpsloss.retrieval.export import batches

logger = logging.getLogger(__name__)


def upload(index: DocumentIndex, client: QdrantClient, collection: str) -> None:
    """Write all documents to a collection, which is replaced."""
    if client.collection_exists(collection):
        client.delete_collection(collection)
    size = index.info["dimension"]
    client.create_collection(collection, models.VectorParams(size=size, distance=models.Distance.DOT))
    for batch in batches(index):
        for start in range(0, len(batch), 1000):
            rows = batch.slice(start, 1000).to_pylist()
            points = [
                models.PointStruct(
                    id=str(uuid.uuid5(uuid.NAMESPACE_OID, str(row["id"]))),
                    vector=row.pop("vector"),
                    payload={**row, "input": None if row["input"] is None else json.loads(row["input"])},
                )
                for row in rows
            ]
            client.upsert(collection, points)


def search(
    client: QdrantClient,
    collection: str,
    model: SentenceTransformer,
    query: str,
    k: int,
    where: models.Filter | None = None,
) -> list[tuple[object, float]]:
    """Find the documents nearest to a query: (id, score), best first."""
    vector = model.encode_query([query], normalize_embeddings=model.similarity_fn_name == "cosine")[0]
    found = client.query_points(collection, query=vector.tolist(), limit=k, query_filter=where).points
    return [((point.payload or {})["id"], point.score) for point in found]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="folder of the index")
    parser.add_argument("--model", required=True, help="folder or Hub id of the model")
    parser.add_argument("--query", required=True, help="a query to search for")
    parser.add_argument("--url", help="address of the server; default: in memory")
    parser.add_argument("--collection", default="documents", help="name of the collection, which is replaced")
    parser.add_argument("-k", type=int, default=10, help="documents to show")
    options = parser.parse_args(argv)
    client = QdrantClient(options.url) if options.url else QdrantClient(":memory:")
    upload(DocumentIndex.load(options.index), client, options.collection)
    model = SentenceTransformer(options.model, trust_remote_code=True)
    for document_id, score in search(client, options.collection, model, options.query, options.k):
        print(f"{document_id}\t{score:.4f}")


if __name__ == "__main__":
    main()
