"""Products with packed FP4 weights: C++ for the CPU, Triton for CUDA. Their plain-torch twin is in `opd.fp4`."""
