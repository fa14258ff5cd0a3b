"""What runs on the laptop: account, plan, upload, submission, following."""
