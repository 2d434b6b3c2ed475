"""Preference data, in one direction: path -> source -> example -> conversation -> token ids -> micro-batches.

Each step is one file: ``paths``; ``json_source``, ``table_source`` and ``indexed``; ``conversations`` with ``turns``;
``template`` and ``encoding``, run over many examples by ``workers`` and stored by ``cache``. ``dataset`` calls them in
this order. ``loader`` picks the pairs of each step, ``batching`` divides them, ``collate`` makes the tensors.
"""
