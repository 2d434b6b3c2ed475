"""One measured run of one trainer: ``bench_worker.py TOOL JOB``; the last line of stdout is JSON.

Imports nothing of this package, so that an interpreter that has only the other trainer can run it.
"""

import contextlib
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

BETA, MARGIN = 2.5, 1.375


def engine(job):
    """``mindspeed-simpo train``."""
    import torch
    import yaml

    torch.set_num_threads(job["threads"])
    from mindspeed_simpo.cli.main import execute

    folder = Path(job["folder"])
    config = {
        "model_name_or_path": job["model"],
        "data_path": job["data"],
        "seed": job["seed"],
        "output_dir": str(folder / "out"),
        "data_cache_dir": str(folder / "cache"),
        "seq_length": job["seq_length"],
        "micro_batch_size": job["micro_batch_size"],
        "global_batch_size": job["micro_batch_size"],
        "train_iters": job["steps"],
        "simpo_beta": BETA,
        "gamma_beta_ratio": MARGIN / BETA,
        "lr": 1e-5,
        "device": "cpu",
        "num_workers": 1,
        "save_interval": 10**6,
    } | job["options"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with contextlib.redirect_stdout(sys.stderr):
        if execute(["train", str(folder / "run.yaml")]) != 0:
            raise SystemExit(1)
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    return [line["step_seconds"] for line in lines], [line["loss"] for line in lines], version("mindspeed-simpo")


def trl(job):
    """TRL's CPOTrainer with SimPO's loss."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    task = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA, "simpo_gamma": MARGIN}
    return _by_trl(job, CPOTrainer, CPOConfig, task)


def trl_dpo(job):
    """TRL's DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    return _by_trl(job, DPOTrainer, DPOConfig, {"beta": 0.1})


def _by_trl(job, trainer_class, config_class, task):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(job["threads"])
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            seconds.append(time.perf_counter() - self.begin)

    rank = job["options"].pop("lora_r", 0)
    adapters, found = None, version("trl")
    if rank:
        from peft import LoraConfig

        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        found += f" with peft {version('peft')}"
    rows = [json.loads(line) for line in Path(job["data_in_our_order"]).read_text(encoding="utf-8").splitlines()]
    arguments = config_class(
        output_dir=str(Path(job["folder"]) / "out"),
        per_device_train_batch_size=job["micro_batch_size"],
        max_steps=job["steps"],
        max_length=job["seq_length"],
        learning_rate=1e-5,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
        **task,
        **job["options"],
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Clock()],
        peft_config=adapters,
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return seconds, losses, found


def llamafactory(job):
    """LLaMA-Factory's DPO stage with SimPO's loss."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    torch.set_num_threads(job["threads"])
    seconds, losses = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args, **_kwargs):
            self.begin = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            seconds.append(time.perf_counter() - self.begin)

        def on_log(self, _args, _state, _control, logs=None, **_kwargs):
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    folder = Path(job["folder"])
    rows = [json.loads(line) for line in Path(job["data_in_our_order"]).read_text(encoding="utf-8").splitlines()]
    flat = [row | {side: row[side][0] for side in ("chosen", "rejected")} for row in rows]
    (folder / "pairs.json").write_text(json.dumps(flat, ensure_ascii=False), encoding="utf-8")
    columns = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags["system_tag"] = "system"
    info = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": info}))
    settings = {
        "stage": "dpo",
        "pref_loss": "simpo",
        "pref_beta": BETA,
        "simpo_gamma": MARGIN,
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": job["model"],
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "qwen",
        "cutoff_len": job["seq_length"],
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": job["micro_batch_size"],
        "max_steps": job["steps"],
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_shuffling": True,
    } | job["options"]
    with contextlib.redirect_stdout(sys.stderr):
        run_exp(settings, callbacks=[Clock()])
    return seconds, losses, version("llamafactory")


def main():
    """Run, and print what was seen."""
    tool = {"engine": engine, "trl": trl, "trl_dpo": trl_dpo, "llamafactory": llamafactory}[sys.argv[1]]
    seconds, losses, found = tool(json.loads(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(
        json.dumps({"step_seconds": seconds, "losses": losses, "peak_memory_bytes": peak, "version": found}) + "\n"
    )


if __name__ == "__main__":
    main()
