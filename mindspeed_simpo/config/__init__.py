"""Every option, what options agree on, and which combinations are supported. Imports no torch."""
