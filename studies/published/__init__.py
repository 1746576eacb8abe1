"""Published MMEB scores: the rows that others printed, and whether their means follow from their parts."""
