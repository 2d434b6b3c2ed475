"""Preference data, in one direction: path -> source -> example -> conversation -> token ids -> micro-batches.

Each step is one file: ``paths``; ``json_source``, ``table_source`` and ``indexed``; ``conversations`` with ``layouts``
and ``turns``; ``template`` and ``encoding``, run over many examples by ``workers`` and stored by ``cache``. ``dataset``
calls them in this order, by way of ``preparation``, whose work ``together`` divides over ranks. ``loader`` picks the
pairs of each step, ``batching`` divides them, ``collate`` makes the tensors.
"""
