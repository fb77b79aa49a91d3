"""Doors: fastattn under models and code that were written for something else."""
