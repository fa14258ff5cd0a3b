"""Boxes and captions drawn on images: by Pillow in their own pixels, by matplotlib as panels of a sheet."""
