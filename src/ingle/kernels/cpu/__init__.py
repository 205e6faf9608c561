"""Kernels for CPUs, in C++ (`csrc/`), compiled on the machine they run on: `operators` are those of a decoder step."""
