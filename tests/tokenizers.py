"""Small tokenizers with the special tokens and the chat templates of the model families."""

from __future__ import annotations

from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Family = Literal["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "glm4"]
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3", "glm4")

TOKENIZER_SIZE = 512
"""Tokens of the tokenizers here, special ones included."""

ENGLISH = """
The tide comes in twice a day because the moon pulls the sea towards it, and the earth turns under that pull.
A good loaf of bread needs flour, water, salt, yeast and above all time; the dough should rest until it doubles.
To sort a list in place, compare each pair of neighbours and swap them while the left one is larger than the right one.
Please write a short letter that thanks the teacher for her help and asks whether the class may visit the museum.
The library opens at nine in the morning and closes at eight in the evening, except on Sunday, when it stays closed.
Water boils at one hundred degrees at sea level, but on a high mountain it boils sooner since the air presses less.
When a program fails, first read the whole message, then find the smallest input that still makes it fail.
She packed two shirts, a map and an old camera, and took the first train to the coast before the sun was up.
The heart pumps blood through the lungs, where it takes up oxygen, and then through the rest of the body.
What is the capital of France? Paris. How many legs does a spider have? Eight. Which planet is the largest? Jupiter.
You could plant beans beside the corn: the beans give nitrogen to the soil and the corn gives them a pole to climb.
I am sorry, I do not know the answer to that question; could you tell me more about what you would like to learn?
"""

CHINESE = """
潮水每天涨落两次，因为月亮吸引着海水，而地球在不停地转动。
做好一个面包需要面粉、水、盐、酵母，最重要的是时间；面团要静置到两倍大。
请写一封简短的信，感谢老师的帮助，并询问班级是否可以参观博物馆。
图书馆早上九点开门，晚上八点关门，星期天休息。
水在海平面上一百度沸腾，但在高山上沸点更低，因为那里的气压更小。
程序出错的时候，先读完整的错误信息，再找出能够重现问题的最小输入。
法国的首都是哪里？巴黎。蜘蛛有几条腿？八条。最大的行星是哪一颗？木星。
对不起，我不知道这个问题的答案；您能告诉我更多您想了解的内容吗？
"""

_SPECIAL: dict[Family, list[str]] = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
    ],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
    "gemma2": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "gemma3_text": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
    "glm4": [
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ],
}

_FIRST: dict[Family, int] = {"mistral": 5, "gemma2": 6, "gemma3_text": 6, "phi3": 3}
"""How many of the special tokens have the first ids; the others have the last ones."""

_PREFIX: dict[Family, list[str]] = {
    "llama": ["<|begin_of_text|>"],
    "mistral": ["<s>"],
    "gemma2": ["<bos>"],
    "gemma3_text": ["<bos>"],
    "phi3": ["<s>"],
    "glm4": ["[gMASK]", "<sop>"],
}
"""What ``add_special_tokens`` puts before every text."""

_NAMED: dict[Family, dict[str, str]] = {
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    },
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "gemma3_text": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "phi3": {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"},
    # the token that opens the user's next turn ends the assistant's
    "glm4": {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"},
}

_CHATML_HEADER = "{{- '<|im_start|>' + message.role + '\\n' }}"
_CHATML_GENERATION = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"

_ALTERNATION = (
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
)
_GEMMA_GENERATION = "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"

_TEMPLATES: dict[Family, str] = {
    # a default system turn, as Qwen2.5
    "qwen2": (
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}" + _CHATML_HEADER + "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    )
    + _CHATML_GENERATION,
    # an empty thought before the last answer only, as Qwen3
    "qwen3": (
        "{%- for message in messages %}"
        + _CHATML_HEADER
        + "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
        "{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    )
    + _CHATML_GENERATION,
    "llama": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
        "{{- message.content | trim + '<|eot_id|>' }}"
        "{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    # no system role: its text opens the first user turn
    "mistral": (
        "{{- bos_token }}{%- set system = '' %}"
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
        "{%- set messages = messages[1:] %}{%- endif %}"
        "{%- for message in messages %}" + _ALTERNATION + "{%- if message.role == 'user' %}"
        "{{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
    ),
    # no system role at all
    "gemma2": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}"
        "{{- raise_exception('System role not supported') }}{%- endif %}"
        "{%- for message in messages %}" + _ALTERNATION + "{{- '<start_of_turn>' }}"
        "{{- ('model' if message.role == 'assistant' else message.role) + '\\n' }}"
        "{{- message.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    )
    + _GEMMA_GENERATION,
    # as Mistral's, the system turn's text opens the first user turn
    "gemma3_text": (
        "{{- bos_token }}{%- set system = '' %}"
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\\n\\n' %}"
        "{%- set messages = messages[1:] %}{%- endif %}"
        "{%- for message in messages %}" + _ALTERNATION + "{{- '<start_of_turn>' }}"
        "{{- ('model' if message.role == 'assistant' else message.role) + '\\n' + (system if loop.first else '') }}"
        "{{- message.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    )
    + _GEMMA_GENERATION,
    # a text without a generation prompt ends with the end of text
    "phi3": (
        "{{- bos_token }}{%- for message in messages %}"
        "{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
    ),
    # nothing ends a turn but the beginning of the next
    "glm4": (
        "{{- '[gMASK]<sop>' }}{%- for message in messages %}"
        "{{- '<|' + message.role + '|>\\n' + message.content | trim }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
    ),
}


def make_tokenizer(family: Family = "qwen2", size: int = TOKENIZER_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``size`` tokens with the family's special tokens and chat template.

    As in the real ones, the special ids come last, except Mistral's, Gemma's and some of Phi-3's, which come first. All
    but Qwen's put a BOS (GLM-4: two tokens) before every text that is encoded with ``add_special_tokens``.
    """
    special = _SPECIAL[family]
    first = special[: _FIRST.get(family, 0)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # <think> and </think> are added tokens in Qwen3, though not special
    added = ["<think>", "</think>"] if family == "qwen3" else []
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special) - len(added) + len(first),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ENGLISH.splitlines(), *CHINESE.splitlines()], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    if family in _PREFIX:
        prefix = " ".join(_PREFIX[family])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A",
            pair=f"{prefix} $A {prefix} $B",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in _PREFIX[family]],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_TEMPLATES[family],
        clean_up_tokenization_spaces=False,
        **_NAMED[family],
    )
