"""What is right, and how fast it is, on one host's NPU or GPU: see docs/device_report.md."""
