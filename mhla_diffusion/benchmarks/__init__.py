"""Speed and memory of MHLA beside its alternatives, one file for each command of ``mhla benchmark``."""
