"""The commands of ``mhla``, one file for each; main.py finds them, end.py ends them."""
