"""chiasm's connectors inside other engines."""
