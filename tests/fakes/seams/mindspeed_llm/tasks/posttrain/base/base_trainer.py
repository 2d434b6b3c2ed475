class BaseTrainer:
    def __init__(self, process_non_loss_data_func=None):
        from megatron.training import get_args

        self.args = get_args()
        self.model = self.model_provider(True, True)

    def model_provider(self, pre_process, post_process):
        from mindspeed_llm.model import GPTModel

        return GPTModel()

    def train(self):
        from megatron.core.pipeline_parallel import schedules

        from mindspeed_llm.model import batches

        self.args.curr_iteration = 0
        self.losses = schedules.get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=batches(self.args),
            model=self.model,
            num_microbatches=self.args.global_batch_size // self.args.micro_batch_size,
            seq_length=8,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=False,
        )
