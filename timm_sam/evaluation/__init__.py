"""Evaluation: data sets and their label spaces, scores, attacks, tables."""
