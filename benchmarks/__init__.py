"""Side-by-side speed measurements; no test depends on a time."""
