"""Scores of features: what each is, how it is computed, and how far it would differ with other samples."""
