"""How `predict` and `Detector` go through images: files, views of large scans, tiles, and what is written."""
