"""Preference data: rows of files to token ids, micro-batches and their order."""
