"""Plug-ins that add this package's objectives to other trainers."""
