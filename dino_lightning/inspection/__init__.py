"""The inspection of a dataset: every count, every image decoded, everything that is wrong by kind."""
