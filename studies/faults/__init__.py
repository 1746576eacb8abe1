"""Long campaigns of faults: what is asked of the package, and how often it answers wrong."""
