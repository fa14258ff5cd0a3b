"""Boxes and captions drawn on images: with Pillow on the image itself, with matplotlib as panels of a sheet."""
