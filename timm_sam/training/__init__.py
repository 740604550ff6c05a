"""train.py: options, model, data, epochs, checkpoints."""
