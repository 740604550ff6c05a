"""Robust accuracy: APGD, its balls, the attack of a batch and of a data set."""
