"""The encoder: backbone, prefixes, pooling, aggregation, slim checkpoints."""
