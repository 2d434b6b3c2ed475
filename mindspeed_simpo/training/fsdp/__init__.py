"""Forward, backward, update and checkpoint of a model that PyTorch's FSDP2 shards."""
