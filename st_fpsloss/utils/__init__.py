"""Small tools that know nothing of this package: atomic file writes, hashing."""
