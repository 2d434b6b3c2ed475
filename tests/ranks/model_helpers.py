"""Small Hugging Face checkpoints, and what transformers and the engine make of them."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

CONFIGS = {
    "deepseek_v3": DeepseekV3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "glm4": Glm4Config,
    "glm4_moe": Glm4MoeConfig,
    "gpt_oss": GptOssConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
}
HEAD_DIMS = {"qwen3": 32, "gemma2": 24, "gemma3_text": 32, "glm4": 16, "qwen3_moe": 32, "glm4_moe": 16, "gpt_oss": 32}
"""Of families whose default is not hidden_size / num_attention_heads."""
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "gemma2": {"query_pre_attn_scalar": 20, "sliding_window": 7, "attn_logit_softcapping": 2.0}
    | {"final_logit_softcapping": 3.0, "pad_token_id": None},
    "gemma3_text": {"query_pre_attn_scalar": 20, "sliding_window": 7, "pad_token_id": None}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {"pad_token_id": None},
    "phi3": {"pad_token_id": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 2}
    | {"first_k_dense_replace": 1, "use_qk_norm": True, "routed_scaling_factor": 1.5, "attention_bias": True},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_shared_experts": 2}
    | {"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4, "q_lora_rank": 28}
    | {"kv_lora_rank": 18, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "attention_bias": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7, "swiglu_limit": 3.0}
    | {"rope_parameters": YARN | {"truncate": False}},
}
"""Settings that a small model needs to show what is special to its family; a padding id has no gradient in torch."""
FROZEN = "e_score_correction_bias"
"""End of the names of tensors without a gradient."""
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_checkpoint(folder, family="qwen2", *, seed=0, dtype=torch.float32, max_shard_size="5GB", **overrides):
    """Save a random model whose biases and norm weights differ from their neutral values."""
    shape = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in HEAD_DIMS:
        shape["head_dim"] = HEAD_DIMS[family]
    config = CONFIGS[family](**(shape | VARIANTS.get(family, {}) | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(0.0, 0.15)
        for buffer in (each for name, each in model.named_buffers() if name.endswith(FROZEN)):
            buffer.normal_(0.0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return str(folder)


def make_tokenizer():
    """A word tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "user", "hello", "world"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_batch(vocab_size, seed=1, rows=3, seq=24):
    """Token ids and labels; the labels hold the first and the last id."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(vocab_size, (2, rows, seq), generator=generator)
    labels[0, 0], labels[0, 1] = 0, vocab_size - 1
    return tokens, labels


def transformers_result(folder):
    """Logits, and the gradients of the mean cross-entropy by name, of transformers' own model: fp32, experts fp64."""
    if "num_experts_per_tok" in (Path(folder) / "config.json").read_text():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, labels = make_batch(model.config.vocab_size)
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return logits.detach().numpy(), gradients_as_stored(model)


def gradients_as_stored(model):
    """Gradients under the names of a checkpoint: transformers keeps all experts of a layer in one parameter."""
    for parameter in model.parameters():
        parameter.data = parameter.grad
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: tensor.numpy() for name, tensor in stored_tensors(folder).items() if not name.endswith(FROZEN)}


def engine_model(folder, layout, **options):
    """Description, groups and filled model of one rank; ``layout`` is (tensor, pipeline, data)."""
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize

    tensor, pipeline, data = layout
    device = open_device("cpu")
    experts = {"expert": options.get(EP, 1), "expert_tensor": options.get(ETP)}
    groups = initialize(Layout(tensor=tensor, pipeline=pipeline, data=data, **experts), device)
    config = Config(
        **{
            "model_name_or_path": str(folder),
            "data_path": "unused",
            "seq_length": 64,
            "batching": "padded",
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
        }
        | options
    )
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.model.megatron.gpt import build_model
    from mindspeed_simpo.model.megatron.weights import fill_adapters, fill_weights

    model_parallel_cuda_manual_seed(1)
    description = read_description(str(folder))
    models = build_model(description, config, groups, device)
    fill_weights(models, description, config, groups, config.seed)
    fill_adapters(models, description, config, groups, config.seed)
    return description, groups, models


def run_engine(folder, layout, **options):
    """One forward and backward through megatron-core's schedule: this rank's logits shard, rank 0's gradients."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.transformer.module import Float16Module

    from mindspeed_simpo.model.megatron.weights import gather_hf_tensors

    description, groups, models = engine_model(folder, layout, **options)
    config = models[0].config
    wrapped = [Float16Module(config, model) for model in models] if config.bf16 else models
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        for model in wrapped
    ]
    tokens, labels = make_batch(description.vocab_size)

    def forward_step(_, model):
        def loss(logits):
            kept = logits.detach().clone()
            losses = vocab_parallel_cross_entropy(logits.float().transpose(0, 1).contiguous(), labels.t().contiguous())
            return losses.mean(), {"logits": kept}

        return model(tokens, lengths=torch.full((len(tokens),), tokens.shape[1])), loss

    for model in wrapped:
        model.zero_grad_buffer()
    kept = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=wrapped,
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=False,
    )
    finalize_model_grads(wrapped)
    gathered = gather_hf_tensors(
        wrapped, description, groups, lambda parameter: getattr(parameter, "main_grad", parameter)
    )
    gradients = {name: grad.float().numpy().copy() for name, grad in gathered if not name.endswith(FROZEN)}
    return (kept[0]["logits"].float().numpy() if kept else None), gradients


def whole_logits(results):
    """Logits over the padded vocabulary from what every rank returned."""
    return np.concatenate([logits for logits, _ in results if logits is not None], axis=-1)


def stored_tensors(folder):
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(file).items()}
