def get_num_microbatches():
    from megatron.training import get_args

    args = get_args()
    return args.global_batch_size // args.micro_batch_size
