"""Faults of the CUDA kernels, made on purpose. run.py is the program, CONTRIBUTING.md says what it is for."""
