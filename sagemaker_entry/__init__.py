"""Training on Amazon SageMaker: `launch` runs on the laptop, `train` in the container."""
