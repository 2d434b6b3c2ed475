"""The options, their validation, the parallel layout and the supported combinations. Imports no torch."""
