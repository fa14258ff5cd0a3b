"""What the laptop and the container both read: the job, the dataset's manifest, lines of progress."""
