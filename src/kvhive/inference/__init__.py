"""Models fed through caches: reading, generating, several caches in one pass."""
