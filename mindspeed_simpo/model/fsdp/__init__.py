"""Models of transformers, with the attention of this package, sharded by PyTorch's FSDP2."""
