"""The contract of a run's folder: file names, newest checkpoint, which options make another run, timing."""
