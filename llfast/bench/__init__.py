"""The fused output head measured beside other ways to its numbers; what all benchmarks report."""
