"""Images with ``backend: fsdp`` as a user types it: check, train, resume, evaluate, export, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mindspeed_simpo.data.processor import load_processor
from tests.e2e.cli import Program, lines_of
from tests.images import make_image_model, picture
from tests.oracle_objectives import Options, Scores, score

QUESTIONS = ("What is in the picture?", "<image> and <image>: which is larger?", "What is the capital of France?")


def make_rows(folder, number):
    """JSONL rows beside a folder of images: of one image, of two, and of none."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for index in range(number):
        kind = index % 3
        names = [f"pictures/{index}_{place}.png" for place in range((1, 2, 0)[kind])]
        for place, name in enumerate(names):
            picture(40 + 7 * index, 90 - 3 * index, seed=index + 100 * place).save(folder / name)
        answers = {"chosen": f"A tide and {index} loaves.", "rejected": f"No {index}"}
        rows.append({"images": names, "prompt": QUESTIONS[kind], **answers})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_image_model(tmp_path_factory.mktemp("images") / "model", "qwen2_5_vl", tied=True)


@pytest.fixture
def program(tmp_path, model):
    data, _ = make_rows(tmp_path / "data", 12)
    return Program(
        tmp_path,
        backend="fsdp",
        model_name_or_path=str(model),
        data_path=str(data),
        output_dir=str(tmp_path / "out"),
        seq_length=256,
        micro_batch_size=2,
        global_batch_size=4,
        train_iters=3,
        lr=1e-3,
        adam_eps=1e-5,
        seed=7,
    )


def loss_by_transformers(folder, data, rows):
    """Mean loss of the rows: rendered, tokenised and computed by the processor and the model of transformers alone."""
    from PIL import Image

    processor = load_processor(str(folder))._processor
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    losses = []
    for row in rows:
        pictures = [Image.open(data.parent / name) for name in row["images"]]
        pieces = row["prompt"].split("<image>") if "<image>" in row["prompt"] else ["", row["prompt"]]
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for place in range(len(pieces) - 1):
            parts = [{"type": "image"}] if pictures else []
            content += [*parts, {"type": "text", "text": pieces[place + 1]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
        sums, counts = [], []
        for name in ("chosen", "rejected"):
            answer = processor.tokenizer(row[name] + "<|im_end|>", return_tensors="pt").input_ids
            inputs = {name: prompt[name] for name in ("pixel_values", "image_grid_thw") if name in prompt}
            ids = torch.cat([prompt.input_ids, answer], dim=1)
            types = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))
            with torch.no_grad():
                logits = model(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0]
            logprobs = torch.log_softmax(logits[prompt.input_ids.shape[1] - 1 : -1], dim=-1)
            sums.append(logprobs.gather(1, answer[0][:, None]).sum())
            counts.append(answer.shape[1])
        losses.append(score(Scores(sums, counts, None, None), Options())[0].item())
    return sum(losses) / len(losses)


def test_train_resume_evaluate_and_export(program, tmp_path, model):
    done = program.run("check")
    assert done.code == 0, done.stdout
    assert "image 1: " in done.stdout
    assert "40 x 90, " in done.stdout
    program.config |= {"save_interval": 2}
    done = program.run("train", 2, output_dir=tmp_path / "whole", export_hf=True)
    assert done.code == 0, done.stderr
    found = lines_of(tmp_path / "whole")
    checkpoints = tmp_path / "whole" / "checkpoints"
    done = program.run("train", 1, load=min(checkpoints.iterdir()), freeze_vision=True)
    assert done.code == 0, done.stderr
    assert lines_of(tmp_path / "out")[-1]["loss"] == pytest.approx(found[-1]["loss"], rel=1e-5)

    done = program.run("export", checkpoint=checkpoints, output=tmp_path / "exported")
    assert done.code == 0, done.stderr
    begun, first, second = (
        load_file(each / "model.safetensors") for each in (model, tmp_path / "whole/hf", tmp_path / "exported")
    )
    assert begun.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = {name for name in begun if not torch.equal(begun[name], first[name])}
    assert changed
    assert not any(name.startswith(("visual", "model.visual")) for name in changed)

    held_out, rows = make_rows(tmp_path / "held out", 5)
    metrics = program.run("evaluate", 2, load=tmp_path / "whole", eval_data_path=held_out).metrics
    expected = loss_by_transformers(tmp_path / "exported", held_out, rows)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "llava"])
def test_the_folder_of_a_run_without_steps_is_the_folder_it_began_from(program, tmp_path, family):
    folder = make_image_model(tmp_path / "model", family)
    done = program.run("train", 2, model_name_or_path=folder, export_hf=True, train_iters=0)
    assert done.code == 0, done.stderr
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "out" / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    exported = load_processor(str(tmp_path / "out" / "hf"))
    assert exported.digest == load_processor(str(folder)).digest


def test_the_whole_model_is_trained_where_asked(program, tmp_path, model):
    program.config |= {"freeze_vision": False, "pair_schedule": "two_pass", "stage": "dpo"}
    done = program.run("train", 2, export_hf=True)
    assert done.code == 0, done.stderr
    # the reference pass and the first step see the same images
    assert lines_of(tmp_path / "out")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    before, after = (load_file(each / "model.safetensors") for each in (model, tmp_path / "out" / "hf"))
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not any("visual" in name for name in same if "k_proj.bias" not in name)


def test_dpo_with_adapters_and_embedded_images(program, tmp_path):
    from datasets import Dataset, Features, Image, Value

    rows = [
        {"image": picture(50, 60, seed=index), "question": "What?", "chosen": f"yes {index}", "rejected": "no"}
        for index in range(8)
    ]
    text = Value("string")
    features = Features({"image": Image(), "question": text, "chosen": text, "rejected": text})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    program.config |= {"stage": "dpo", "lora_r": 4, "lr": 1e-2, "data_path": str(tmp_path / "rows.parquet")}
    done = program.run("train", 2, export_hf=True)
    assert done.code == 0, done.stderr
    lines = lines_of(tmp_path / "out")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all("language_model" in name for name in load_file(tmp_path / "out" / "hf" / "adapter_model.safetensors"))
    done = program.run(
        "export", checkpoint=tmp_path / "out" / "checkpoints", output=tmp_path / "merged", merge_adapters=True
    )
    assert done.code == 0, done.stderr
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    load_processor(str(tmp_path / "merged"))


def test_unreadable_images_are_named_rows(program, tmp_path):
    data, pictures = tmp_path / "data" / "rows.jsonl", tmp_path / "data" / "pictures"
    whole = (pictures / "3_0.png").read_bytes()
    (pictures / "3_0.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "0_0.png").unlink()
    missing, damaged = "unreadable image: there is no image", "3_0.png cannot be decoded"
    message = program.run("train", 1).fails(1, "2 of 12 rows", f"{data}:1: {missing}", f"{data}:4: unreadable", damaged)
    assert "0_0.png" in message
    done = program.run("train", 1, data_errors="drop", output_dir=tmp_path / "dropped")
    assert done.code == 0, done.stderr
    (pictures / "3_0.png").write_bytes(whole)
    picture(40, 90).save(pictures / "0_0.png")
    # a run that left rows out goes on without them
    done = program.run("train", 1, data_errors="drop", output_dir=tmp_path / "dropped", load="auto", train_iters=4)
    assert done.code == 0, done.stderr
    # else what was corrected is read again
    done = program.run("train", 1)
    assert done.code == 0, done.stderr
    # and what has changed since is an error, which names the row
    for name in pictures.iterdir():
        picture(50, 50, seed=9).save(name)
    program.run("train", 1, output_dir=tmp_path / "again").fails(
        1, f"{data}:", "has changed since its row was tokenised"
    )


def test_models_of_text_and_other_backends_refuse_images_by_row(program, tmp_path):
    from tests.hf import make_checkpoint

    data = tmp_path / "data" / "rows.jsonl"
    folder = make_checkpoint(tmp_path / "text", "qwen2", hidden=32)
    program.config |= {"model_name_or_path": str(folder)}
    for backend in ("megatron", "fsdp"):
        words = "the row has images, and the model takes none: images need backend: fsdp"
        program.run("train", 1, backend=backend).fails(1, f"{data}:1: malformed", words, "8 of 12 rows")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"lora_r": 4, "freeze_vision": False}, ["freeze_vision: false", "lora_r"]),
        ({"backend": "megatron", "freeze_vision": False}, ["freeze_vision", "only backend: fsdp has it"]),
    ],
)
def test_refused_by_name(program, flags, fragments):
    program.config |= flags
    program.run("train", 1).fails(2, *fragments)
