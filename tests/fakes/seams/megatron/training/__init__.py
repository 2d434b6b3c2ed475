import types

_args = None


def set_args(args):
    global _args
    _args = args


def get_args():
    return _args


def print_rank_0(message):
    print(message, flush=True)


def get_timers():
    timer = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
    return lambda name, log_level=0: timer
