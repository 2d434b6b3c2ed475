"""``analyse``: what a run has learnt, pair by pair, as numbers and as one page of figures."""
