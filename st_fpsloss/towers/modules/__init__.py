"""The sentence-transformers modules that towers with side features or a document bias are made of."""
