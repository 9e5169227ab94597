"""What pullback costs, beside plain autograd and beside other libraries: ``python -m benchmarks``."""
