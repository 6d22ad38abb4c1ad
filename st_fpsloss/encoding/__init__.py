"""From the columns of a batch to embeddings: each distinct row is encoded once, in mini-batches sorted by length."""
