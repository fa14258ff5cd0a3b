"""What runs in the training container, on each host of a job."""
