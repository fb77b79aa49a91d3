"""Training of the models of `fastattn.models`: ``python -m fastattn train``."""
