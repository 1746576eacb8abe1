"""The embedded world: generated pictures with known factors, and a benchmark in the MMEB layout."""
