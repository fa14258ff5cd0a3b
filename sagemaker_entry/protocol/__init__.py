"""What the laptop and the container share: job, dataset manifest, progress lines, instance types."""
