"""The tables and figures of the SAM-ON paper (arXiv:2306.04226): the runs that each needs, and its numbers."""
