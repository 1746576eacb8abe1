"""InfoNCE over paths, mutual information between paths, statistics of embeddings."""
