"""Sweeps: a training for each combination of values, compared by a metric of the held-out pairs.

``space`` reads what is swept, ``plan`` checks it against the configuration, ``database`` and ``ledger`` keep the trials
in an Optuna study, ``sampler`` draws them, ``trial`` and ``worker`` run them, ``results`` and ``report`` show them.
"""
