"""The options of optimization, batches, pair schedules and memory."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from mindspeed_simpo.config.options.base import CPU_CHUNK_TOKENS, BatchingName, Options, option


class TrainingOptions(Options):
    """Training."""

    micro_batch_size: int = option(
        1,
        ge=1,
        effect="arithmetic",
        description="Pairs per micro-batch on one data-parallel rank with batching: padded; packed and "
        "prefix_shared fill "
        "micro-batches up to max_tokens_per_micro_batch instead.",
    )
    global_batch_size: int = option(
        128, ge=1, le=1_000_000, effect="result", description="Pairs per optimizer step, over all ranks."
    )
    batching: BatchingName = option(
        "auto",
        effect="arithmetic",
        description="How sequences form a micro-batch. padded: one row each, padded to one length; packed: "
        "concatenated in "
        "one row without padding; prefix_shared: packed, with each prompt once for chosen and rejected. The "
        "gradients are "
        "the same. auto: prefix_shared, packed or padded, the first that model and layout support.",
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        ge=1,
        effect="arithmetic",
        description="With batching: packed or prefix_shared, the number of tokens up to which a micro-batch is "
        "filled with "
        "pairs; a larger pair forms its own micro-batch. Default: 2 x seq_length, the size of the longest pair.",
    )
    train_iters: int | None = option(
        None,
        ge=0,
        effect="result",
        description="Number of optimizer steps. Default: num_train_epochs passes over the training data.",
    )
    num_train_epochs: int | None = option(
        None,
        ge=1,
        effect="result",
        description="Passes over the training data, instead of train_iters. The last batch of a pass may have fewer "
        "pairs; its loss is the mean over them. Default: 1.",
    )
    lr: float = option(1e-6, gt=0, effect="result", description="Peak learning rate.")
    min_lr: float = option(0.0, ge=0, effect="result", description="Learning rate at the end of the decay; at most lr.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option(
        "cosine", effect="result", description="Shape of the learning-rate decay after warm-up."
    )
    lr_warmup_fraction: float = option(
        0.1, ge=0, lt=1, effect="result", description="Fraction of train_iters with linear learning-rate warm-up."
    )
    weight_decay: float = option(
        0.0, ge=0, effect="result", description="Decoupled weight decay (AdamW); norm weights and biases are exempt."
    )
    moe_aux_loss_coeff: float = option(
        0.0,
        ge=0,
        effect="result",
        description="Weight of the auxiliary loss that balances the experts of each layer, sequence by sequence, no "
        "unit; 0 adds none. The reported loss does not include it.",
    )
    clip_grad: float = option(
        1.0,
        ge=0,
        effect="result",
        description="Largest L2 norm of the global gradient, above which it is scaled down; 0 means no clipping.",
    )
    adam_beta1: float = option(0.9, ge=0, lt=1, effect="result", description="Adam's decay rate of the first moment.")
    adam_beta2: float = option(0.95, ge=0, lt=1, effect="result", description="Adam's decay rate of the second moment.")
    adam_eps: float = option(
        1e-8, gt=0, effect="result", description="Adam's epsilon, added to the square root of the second moment."
    )
    seed: int = option(
        42,
        ge=1,
        lt=2**31,
        effect="result",
        description="Seed of the data order, of random initial weights and of the masks of dropout.",
    )
    bf16: bool | None = option(
        None,
        effect="result",
        description="Compute in bfloat16, with main parameters, gradients and optimizer state in fp32. Default: true "
        "on npu and cuda, false on cpu.",
    )
    pair_schedule: Literal["concat", "split", "two_pass"] = option(
        "concat",
        effect="arithmetic",
        description="How chosen and rejected pass through the model. concat: one forward and one backward; split: two "
        "forwards and one backward; two_pass: one after the other, with half of the stored activations and one more "
        "forward of the rejected. The gradients are the same.",
    )
    fused_logprob: bool = option(
        True,
        effect="arithmetic",
        description="Compute output layer and log-probabilities in chunks of tokens: the logits are not stored, and "
        "the "
        "backward computes them again.",
    )
    logprob_chunk_tokens: int | None = option(
        None,
        ge=1,
        effect="arithmetic",
        description="With fused_logprob, response tokens per chunk, whose logits are in memory at the same time. "
        "Default: 512 on cpu; on npu 4096, or as many as have fp32 logits of 1 GiB on a rank; on cuda, which stores "
        "none in fp32, 4096 or twice as many.",
    )
    recompute_granularity: Literal["full", "selective"] | None = option(
        None,
        effect="arithmetic",
        description="Activation recomputation in the backward: full for whole layers, selective for the attention "
        "core. "
        "Default: none.",
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None,
        effect="arithmetic",
        description="With recompute_granularity: full. uniform recomputes all layers, in blocks of "
        "recompute_num_layers; block "
        "recomputes only the first recompute_num_layers layers of each pipeline rank.",
    )
    recompute_num_layers: int | None = option(
        None,
        ge=1,
        effect="arithmetic",
        description="With recompute_granularity: full, a number of layers; see recompute_method.",
    )

    @property
    def bf16_in_use(self) -> bool:
        """``bf16``; before :func:`~mindspeed_simpo.config.resolution.resolve` its default is that of CPUs."""
        return bool(self.bf16)

    @property
    def chunk_tokens_in_use(self) -> int:
        """``logprob_chunk_tokens``; before :func:`~mindspeed_simpo.config.resolution.resolve` as on CPUs."""
        return CPU_CHUNK_TOKENS if self.logprob_chunk_tokens is None else self.logprob_chunk_tokens

    @model_validator(mode="after")
    def _step_agrees(self) -> TrainingOptions:
        if self.train_iters is not None and self.num_train_epochs is not None:
            raise ValueError(
                f"train_iters ({self.train_iters}) and num_train_epochs ({self.num_train_epochs}) both say how long to "
                "train: remove one of them"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) is not a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        full = self.recompute_granularity == "full"
        if full != (self.recompute_method is not None) or full != (self.recompute_num_layers is not None):
            raise ValueError(
                "recompute_granularity: full goes with recompute_method and recompute_num_layers, and they with it"
            )
        return self
