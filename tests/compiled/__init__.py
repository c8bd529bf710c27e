"""What the Triton kernels are compiled for, a file a family; `compile_cases.py` is their table."""
