"""The package inside other trainers."""
