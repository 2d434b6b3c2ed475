"""From hidden states to log-probabilities of responses, and from these to the loss and the metrics of each pair."""
