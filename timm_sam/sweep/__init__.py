"""A grid over flags of train.py."""
