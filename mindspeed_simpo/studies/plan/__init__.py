"""Which layout trains a model fastest on a cluster: enumeration, simulation of a step, and the order of the results."""
