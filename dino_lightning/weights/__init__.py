"""Weights from files and addresses: read safely, told apart, mapped to our names, loaded."""
