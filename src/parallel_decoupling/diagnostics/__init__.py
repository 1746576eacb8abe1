"""How the paths of a trained model differ."""
