"""Faults by chance, as many as there is time for, and what came of each: the cases of scripts/stress.py."""
