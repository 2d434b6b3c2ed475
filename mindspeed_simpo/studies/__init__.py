"""What is built on finished parts: pages of figures, sweeps, on-policy pairs."""
