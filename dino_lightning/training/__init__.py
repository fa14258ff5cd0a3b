"""The LightningModule and what belongs to a training step: optimizer, schedule, memory, resuming."""
