"""The page in a browser: the options as a form, ``check``, runs of this host, their curves and answers."""
