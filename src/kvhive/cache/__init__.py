"""The cache: one step of one layer (`layer`, `eviction`), and the face users see (`hive_cache`)."""
