"""Evaluation sets: their folders, label spaces, images and loaders."""
