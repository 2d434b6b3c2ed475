"""Programs for benchmarks, the parity matrix, generated documentation and figures; the tests import some of these."""
