"""What the paths of a trained model are: similarity, probes, attention, contributions, errors."""
