"""The LightningModule and the parts of a training step: optimizer, schedule, memory, resuming."""
