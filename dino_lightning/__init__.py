"""Train the DINO object detector with PyTorch Lightning."""
