"""Training: the LightningModule and what it is made of."""
