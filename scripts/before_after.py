"""Show what a run changed: its first and last evaluation, and answers of both models to held-out prompts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

METRICS = {
    "loss": "loss",
    "rewards/accuracies": "pairs where the chosen answer has the higher reward",
    "rewards/margins": "reward of chosen minus rejected",
    "logps/chosen": "log-probability of chosen, nats per token",
    "logps/rejected": "log-probability of rejected, nats per token",
}
SHOWN_ANSWERS = 3


def evaluations(metrics_file: Path) -> tuple[dict[str, float], dict[str, float]]:
    """First and last line of a run's metrics that an evaluation wrote."""
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line["split"] == "eval"]
    if len(found) < 2:
        raise SystemExit(f"error: {metrics_file}: expected at least two evaluations, found {len(found)}")
    return found[0], found[-1]


@torch.no_grad()
def answers(model_folder: Path, prompts: list[str]) -> list[str]:
    """The model's most likely answer to each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    generated = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def count_right(given: list[str], chosen: list[str]) -> int:
    """Answers that say what the chosen one says, whatever friendly words they open with."""
    return sum(answer.split("! ")[-1] == wanted.split("! ")[-1] for answer, wanted in zip(given, chosen, strict=True))


def arguments_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that say what is compared."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("start", type=Path, help="Hugging Face folder of the model that it started from")
    parser.add_argument("pairs", type=Path, help="held-out pairs, JSONL")
    return parser


def compare(run: Path, start: Path, pairs: Path) -> Table:
    """The comparison of ``output_dir`` and the model before its first step, on held-out pairs."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    prompts, chosen = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    first, last = evaluations(run / "metrics.jsonl")
    before, after = answers(start, prompts), answers(run / "hf", prompts)

    table = Table(
        f"{len(rows)} held-out prompts", "before", f"after {last['step']} steps", title="What training changed"
    )
    for name, meaning in METRICS.items():
        table.add_row(meaning, f"{first[name]:.3f}", f"{last[name]:.3f}")
    table.add_row("right answers", str(count_right(before, chosen)), str(count_right(after, chosen)), end_section=True)
    for prompt, old, new in zip(prompts[:SHOWN_ANSWERS], before, after, strict=False):
        table.add_row(*map(escape, (prompt, old, new)))
    return table


def main() -> None:
    """Print the comparison."""
    arguments = arguments_parser(__doc__).parse_args()
    console = Console(width=max(100, Console().width))
    console.print(compare(arguments.run, arguments.start, arguments.pairs))


if __name__ == "__main__":
    main()
