"""From the micro-batches of one optimizer step to gradients, by megatron-core's forward-backward schedules."""
