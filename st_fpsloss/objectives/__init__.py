"""The mathematics of the losses, on embeddings alone: no model, no trainer, no tokens."""
