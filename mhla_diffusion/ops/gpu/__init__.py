"""Triton kernels of the operators: what they compute, and how they are launched. Needs the package triton."""
