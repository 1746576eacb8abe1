"""Indexes over embeddings: search by one path, the aggregate, the aligned sum or MaxSim, with filters."""
