"""Hidden states to log-probabilities, and log-probabilities to the loss of each pair."""
