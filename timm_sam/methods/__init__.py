"""SAM methods, one file a paper; each fills some of the slots of `stages.py`."""
