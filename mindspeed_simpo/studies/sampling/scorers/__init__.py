"""What scores answers: a reward model, a pairwise ranker, or a program of the user's."""
