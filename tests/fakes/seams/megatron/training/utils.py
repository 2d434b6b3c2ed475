def print_rank_last(message):
    print(message, flush=True)
