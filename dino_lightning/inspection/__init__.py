"""Inspection of a dataset: counts, every image decoded, and all problems by kind.

`inspect` reads the annotations and the images (`image_facts`), runs the checks (`checks`, `near_duplicates`) and
returns a `report.HealthReport`, which `text` turns into tables and JSON and `page` into one HTML page.
"""
