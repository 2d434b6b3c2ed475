"""One optimizer step's micro-batches of pairs -> gradients, through megatron-core's forward-backward schedules."""
