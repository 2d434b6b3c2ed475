"""Images of rows: every form that data sets have, their places, what cannot be used, and the tokens that come of it."""

import base64
import io
import json

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value
from PIL import Image as Pictures

from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.dataset import prepare_pairs
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.pixels import ImageInputs
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.processor import load_processor
from mindspeed_simpo.data.template import ChatFormat
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.data.turns import Message, PlacedImage
from mindspeed_simpo.errors import DataError
from tests.images import encoded, make_image_model, picture
from tests.unit.data_helpers import config_for, tokenizer, write_jsonl

ANSWERS = {"chosen": "yes it is", "rejected": "no"}
PNG, JPEG = encoded(picture(60, 40)), encoded(picture(50, 90, seed=1), "JPEG")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
OTHER = {"role": "assistant", "content": [{"type": "text", "text": "no"}]}


def parts(*images, text="What?"):
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


FORMS = {
    "path": {"images": ["a.png"], "prompt": "<image>What?"},
    "one path": {"image": "a.png", "prompt": "<image>What?"},
    "bytes as text": {"image": {"bytes": base64.b64encode(PNG).decode(), "path": "x"}, "prompt": "What?"},
    "object with path": {"images": [{"path": "a.png"}], "prompt": "<image>What?"},
    "no place": {"image": "a.png", "prompt": "What?"},
    "data uri": {"images": [URI], "prompt": "<image>What?"},
    "file uri": {"images": ["file://FOLDER/a.png"], "prompt": "<image>What?"},
    "absolute path": {"images": ["FOLDER/a.png"], "prompt": "<image>What?"},
    "part": {"images": ["a.png"], "prompt": parts({"type": "image"})},
    "part with path": {"prompt": parts({"type": "image", "path": "a.png"})},
    "part with image": {"prompt": parts({"type": "image", "image": "a.png"})},
    "part with url": {"prompt": parts({"type": "image", "url": "file://FOLDER/a.png"})},
    "part with data": {"prompt": parts({"type": "image", "image": URI})},
    "image_url": {"prompt": parts({"type": "image_url", "image_url": {"url": URI}})},
    "part of arrow": {"images": ["a.png"], "prompt": parts({"type": "image", "text": None, "image": None})},
    "question": {"image": ["a.png"], "question": "<image>What?"},
    "sharegpt": {"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>What?"}]},
    "instruction": {"images": ["a.png"], "instruction": "<image>What?"},
    "whole conversations": {"images": ["a.png"], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_image_model(tmp_path_factory.mktemp("model") / "qwen2_5_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def processor(model):
    return load_processor(str(model))


@pytest.fixture(scope="module")
def text_tokenizer(model, processor):
    return load_tokenizer(str(model), None, processor.chat_template)


@pytest.fixture
def prepared(tmp_path, processor, text_tokenizer):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.jpg").write_bytes(JPEG)

    def prepare(data, **options):
        if isinstance(data, list):
            data = write_jsonl(tmp_path / "rows.jsonl", data)
        config = config_for(tmp_path, data, **{"seq_length": 400, **options})
        return prepare_pairs(config, text_tokenizer, "train", progress=False, images=processor)

    return prepare


def placed(row, folder):
    return json.loads(json.dumps(row).replace("FOLDER", str(folder)))


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_rows(tmp_path, prepared, processor, text_tokenizer, form):
    row = placed(FORMS[form], tmp_path)
    data = prepared([row if "chosen" in row else row | ANSWERS])
    assert data.has_images
    pair = data[0]
    messages = parts({"type": "image"})
    text = processor._processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor._processor(text=[text], images=[[picture(60, 40)]], add_special_tokens=False)
    assert pair.prompt_ids == expected["input_ids"][0]
    [image] = pair.images
    assert image.open().tobytes() == picture(60, 40).tobytes()
    assert text_tokenizer.decode(pair.chosen_ids).endswith("<|im_end|>")


def test_several_images_in_their_places(prepared, processor):
    row = {"images": ["b.jpg", "a.png"], "prompt": "one <image> and\n<image>?", **ANSWERS}
    pair = prepared([row])[0]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\none {place} and\n{place}?<|im_end|>\n<|im_start|>assistant\n"
    pictures = [Pictures.open(io.BytesIO(JPEG)), picture(60, 40)]
    expected = processor._processor(text=[text], images=[pictures], add_special_tokens=False)
    assert pair.prompt_ids == expected["input_ids"][0]
    assert [image.open().size for image in pair.images] == [(50, 90), (60, 40)]


def table_rows(form):
    image = {"image": Image(), "question": Value("string")}
    text = {"chosen": Value("string"), "rejected": Value("string")}
    if form == "rlaif_v":
        row = {"ds_name": "x", "image": picture(60, 40), "question": "What?", "idx": 1, **ANSWERS}
        return Features({"ds_name": Value("string"), **image, "idx": Value("int64"), **text}), [row]
    if form == "list of images":
        row = {"images": [picture(60, 40)], "prompt": "<image>What?", **ANSWERS}
        return Features({"images": Sequence(Image()), "prompt": Value("string"), **text}), [row]
    content = [{"type": Value("string"), "text": Value("string")}]
    turns = [{"role": Value("string"), "content": content}]
    user = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}
    row = {"images": [picture(60, 40)], "prompt": [user], "chosen": [ANSWER], "rejected": [OTHER]}
    return Features({"images": Sequence(Image()), "prompt": turns, "chosen": turns, "rejected": turns}), [row]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("form", ["rlaif_v", "list of images", "trl"])
def test_tables_with_images(tmp_path, prepared, form, kind):
    features, rows = table_rows(form)
    table = Dataset.from_list(rows, features=features)
    if kind == "parquet":
        table.to_parquet(tmp_path / "rows.parquet")
        data = prepared(tmp_path / "rows.parquet")
    else:
        DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
        data = prepared(tmp_path / "saved")
    same = prepared([{"image": "a.png", "prompt": "What?", **ANSWERS}])
    assert data[0].prompt_ids == same[0].prompt_ids
    assert data[0].images[0].open().tobytes() == picture(60, 40).tobytes()


BAD = {
    "more places": ({"images": ["a.png"], "prompt": "<image><image>"}, "2 image places and 1 images"),
    "more images": ({"images": ["a.png", "b.jpg"], "prompt": "<image>"}, "1 image places and 2 images"),
    "a place alone": (
        {"prompt": "<image> what?"},
        "the user turn has an image place <image>, and the row has no image",
    ),
    "more parts": ({"images": [], "prompt": parts({"type": "image"})}, "1 image places and 0 images"),
    "in an answer": (
        {"images": ["a.png"], "prompt": "What?", "chosen": "see <image>"},
        "chosen: an answer has an image",
    ),
    "part of an answer": (
        {"prompt": "What?", "chosen": {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]}},
        "chosen: an answer has an image",
    ),
    "of the rejected": ({"images": ["a.png"], "rejected_images": ["b.jpg"], "prompt": "<image>"}, "`rejected_images`"),
    "both columns": ({"images": ["a.png"], "image": "a.png", "prompt": "<image>"}, "could be the images"),
    "missing": ({"images": ["c.png"], "prompt": "<image>"}, "unreadable image: there is no image"),
    "truncated": ({"images": ["cut.jpg"], "prompt": "<image>"}, "cut.jpg cannot be decoded"),
    "no image": ({"images": ["rows.jsonl"], "prompt": "<image>"}, "rows.jsonl cannot be decoded"),
    "an address": ({"images": ["https://a.b/c.png"], "prompt": "<image>"}, "images are not fetched"),
    "a number": ({"images": [5], "prompt": "<image>"}, "images[0]: expected an image"),
    "no base64": (
        {"images": ["data:image/png;base64,%%"], "prompt": "<image>"},
        "the bytes of the image are not base64",
    ),
    "a special token": ({"images": ["a.png"], "prompt": "<|image_pad|>?"}, "special token '<|image_pad|>'"),
    "narrow": ({"images": ["narrow.png"], "prompt": "<image>"}, "refuses the images"),
    "a video": ({"prompt": parts({"type": "video", "path": "a.mp4"})}, "a part of type 'video'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_a_named_row(tmp_path, prepared, case):
    (tmp_path / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    (tmp_path / "narrow.png").write_bytes(encoded(picture(2000, 2)))
    row, words = BAD[case]
    good = {"images": ["a.png"], "prompt": "<image>", **ANSWERS}
    with pytest.raises(DataError) as caught:
        prepared([good, ANSWERS | row])
    assert f"{tmp_path / 'rows.jsonl'}:2: " in str(caught.value)
    assert words in str(caught.value)
    assert len(prepared([good, ANSWERS | row], data_errors="drop")) == 1


def test_prompts_with_images_are_not_cut(prepared):
    words = "tide bread library " * 30
    row = {"images": ["a.png"], "prompt": "<image>What?", "chosen": words, "rejected": "no"}
    whole = prepared([row], seq_length=400)[0]
    cut = prepared([row], seq_length=len(whole.prompt_ids) + 5, truncation="keep_end", max_prompt_length=4)[0]
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.chosen_ids == whole.chosen_ids[:5]
    with pytest.raises(DataError, match="a prompt with images is not cut"):
        prepared([row], seq_length=len(whole.prompt_ids), truncation="keep_start", max_prompt_length=4)


def test_models_of_text_read_lists_of_text_parts_and_refuse_images():
    reader = ExampleReader(None)
    row = {"prompt": parts(text="a"), "chosen": [ANSWER], "rejected": [OTHER]}
    assert reader.read(row).prompt == (Message("user", "a"),)
    assert reader.read({"prompt": "an <image> tag", **ANSWERS}).prompt == (Message("user", "an <image> tag"),)
    for nothing in ([], "", None):
        assert reader.read({"prompt": "q", "images": nothing, **ANSWERS}).images == []
    with pytest.raises(ExampleError, match="backend: fsdp and a model that transformers has for images and text"):
        reader.read({"prompt": "q", "images": ["a.png"], **ANSWERS})


def test_text_of_a_model_with_images_is_rendered_as_before(text_tokenizer, processor):
    row = {"prompt": "What is this?", **ANSWERS}
    pair = ExampleReader(None).read(row)
    given = {"seq_length": 400, "prompt_limit": 200, "truncation": "error"}
    alone = PairEncoder(text_tokenizer, **given).encode(pair)
    assert PairEncoder(text_tokenizer, images=processor, **given).encode(pair) == alone


def test_templates_that_read_parts_only_are_given_parts(tmp_path):
    folder = make_image_model(tmp_path / "llava", "llava")
    processor = load_processor(str(folder))
    chat = ChatFormat(load_tokenizer(str(folder), None, processor.chat_template), images=True)
    row = {"images": ["a.png"], "prompt": "What?", "system": "Be brief.", **ANSWERS}
    rendered = chat.render(ExampleReader(None, takes_images=True).read(row))
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert rendered.prompt == f"{system}<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    # the tokenizer of a text model with a template of text is given text
    assert not ChatFormat(tokenizer(), images=True)._as_parts


def test_pieces_of_a_turn():
    turn = Message("user", "ab", images=(PlacedImage(0), PlacedImage(1), PlacedImage(1), PlacedImage(2)))
    assert turn.pieces == ["", "a", "", "b", ""]
    image, a, b = {"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    assert turn.for_template()["content"] == [image, a, image, image, b, image]


def test_the_cache_belongs_to_the_content_of_images(tmp_path, prepared, processor):
    rows = [{"images": ["a.png"], "prompt": "<image>", **ANSWERS}, {"prompt": "text", **ANSWERS}]
    first = prepared(rows)
    assert not prepared(rows[1:]).has_images
    (tmp_path / "a.png").write_bytes(encoded(picture(60, 40, seed=5)))
    again = prepared(rows, data_cache_dir=str(tmp_path / "other cache"))
    assert first[0].prompt_ids == again[0].prompt_ids
    assert first.fingerprint != again.fingerprint
    inputs = ImageInputs(processor, None)
    assert inputs.of([again[0], again[1]], [0, 1]).tokens.numel() == again[0].prompt_ids.count(processor.token_id)
    with pytest.raises(DataError, match=r"rows.jsonl:1: the image .*a.png has changed since"):
        inputs.of([first[0]], [0])


def test_worker_processes_read_images(tmp_path, prepared, monkeypatch):
    from mindspeed_simpo.data import preparation, workers

    rows = [{"images": ["a.png"], "prompt": f"<image>{number}", **ANSWERS} for number in range(12)]
    alone = prepared(rows)
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 4)
    parallel = prepared(rows, num_workers=2, data_cache_dir=str(tmp_path / "other"))
    assert parallel.fingerprint == alone.fingerprint
    assert parallel[11] == alone[11]
