"""Small data sets on disk, each laid out exactly as it is published; the pages below docs/datasets say where each layout is from.

Every builder fills a folder and returns it. Pictures are one colour each, so that a test can tell which one it got.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metamorph.media import open_image
from metamorph.messages import Example, ImagePart, Message, TextPart

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "black")


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (32, 24)) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, quality=95)
    return path


def encoded(colour: str, size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    """A picture of one colour as the bytes of its file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=kind)
    return buffer.getvalue()


def video(path: Path, seconds: float = 4.0, fps: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
    """A clip whose grey value rises from frame to frame, so that the order of frames can be told."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    number = round(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if path.suffix == ".webm":
            stream.options = {"deadline": "realtime", "cpu-used": "8"}
        for index in range(number):
            grey = round(40 + 170 * index / max(1, number - 1))
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_video(path: Path, seconds: float = 8.0) -> Path:
    """A .mkv or .webm of which only the first half of the file is left."""
    data = video(path, seconds).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]


def cambrian(root: Path) -> Path:
    """nyu-visionx/Cambrian-10M: `jsons/*.jsonl` and the folders of the unpacked archives beside it."""
    picture(root / "coco" / "train2017" / "000000033471.jpg", "red")
    picture(root / "chartqa" / "train" / "png" / "1.png", "green")
    system = {"from": "system", "value": "Answer the question using a single word or phrase."}
    rows = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "source": "llava_665k.json",
         "conversations": _turns("<image>\nWhat colour is it?", "Red.", "Is it dark?", "No.")},
        {"id": "q1", "image": "chartqa/train/png/1.png", "source": "chartqa_28k.json",
         "conversations": [system, *_turns("<image>\nWhich colour has the chart?", "green")]},
        {"id": "t1", "source": "orca_math.json", "conversations": _turns("What is 2 + 2?", "4")},
        {"id": "t2", "image": None, "source": "code_feedback.json", "conversations": _turns("Print 1 in Python.", "print(1)")},
    ]  # fmt: skip
    _jsonl(root / "jsons" / "Cambrian7M_withsystemprompt.jsonl", rows)
    return root


def video_star(root: Path) -> Path:
    """orrzohar/Video-STaR: `ft_json/*_tune_.json`; the videos come from three other data sets."""
    video(root / "Kinetics700" / "archery" / "0S-P4lr_c7s.mp4", seconds=4)
    video(root / "STAR-benchmark" / "6H78U.mp4", seconds=3)
    video(root / "FineDiving" / "17_8.mp4", seconds=2)
    rows = {
        "kinetics700": [
            {"id": "k700_0", "video": "Kinetics700/archery/0S-P4lr_c7s.mp4", "conversations": _turns("<video>\nWhat is done?", "Archery.")},
            {"id": "k700_1", "video": "Kinetics700/archery/0S-P4lr_c7s.mp4", "conversations": _turns("Where?\n<video>", "In a hall.")},
        ],
        "starb": [{"id": "starb_0", "video": "STAR-benchmark/6H78U.mp4", "conversations": _turns("<video>\nWhat was taken?", "The cup.")}],
        "finediving": [{"id": "fd_0", "video": "FineDiving/17_8.mp4", "conversations": _turns("<video>\nHow good was it?", "7.5")}],
    }
    for name, content in rows.items():
        _json(root / "ft_json" / f"{name}_tune_.json", content)
    return root


def share_video(root: Path) -> Path:
    """ShareGPTVideo/train_video_and_instruction: JSON lines, and folders of frames that were taken twice a second."""
    for name, number in (("v_XNTy5ZTMqVU-Scene-011", 6), ("SRhIRNhtdxQ", 3)):
        for frame in range(number):
            picture(root / "train_300k" / name / f"c01_{frame + 1:04}.jpeg", COLOURS[frame])
    instruction = root / "video_instruction" / "train"
    _jsonl(
        instruction / "sft" / "video_240k_caption_15k.jsonl",
        [
            {"video": "v_XNTy5ZTMqVU-Scene-011", "id": "v_XNTy5ZTMqVU-Scene-011_1",
             "conversations": _turns("<video>\nWhat is the setting of the video?", "A newsroom.")},
            {"video": "SRhIRNhtdxQ", "id": "SRhIRNhtdxQ_2", "conversations": _turns("<video>\nIs there any text?", "No.")},
        ],
    )  # fmt: skip
    _jsonl(
        instruction / "sft" / "video_caption_300k.jsonl",
        [{"video": "SRhIRNhtdxQ", "id": "SRhIRNhtdxQ", "conversations": _turns("Describe the video.\n<video>", "Someone cooks.")}],
    )
    return root


def pairs(root: Path, *, shards: int = 2) -> Path:
    """What img2dataset writes with `--output_format webdataset`: NNNNN.tar with jpg, txt and json for each pair, and NNNNN.parquet."""
    root.mkdir(parents=True, exist_ok=True)
    captions = ("a red square", "green grass on a hill", "  the sea  ")
    for shard in range(shards):
        with tarfile.open(root / f"{shard:05}.tar", "w") as archive:
            for index, caption in enumerate(captions):
                key = f"{shard:05}{index:04}"
                meta = {"url": f"https://example.org/{key}", "caption": caption, "key": key, "status": "success", "error_message": None,
                        "width": 32, "height": 24, "original_width": 64, "original_height": 48, "exif": "{}"}  # fmt: skip
                for suffix, data in (
                    ("jpg", encoded(COLOURS[index], kind="JPEG")),
                    ("txt", caption.encode()),
                    ("json", json.dumps(meta).encode()),
                ):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
        (root / f"{shard:05}.parquet").write_bytes(b"PAR1")  # statistics of the download, which no adapter reads
        _json(root / f"{shard:05}_stats.json", {"count": len(captions), "successes": len(captions)})
    return root


def howto100m(root: Path) -> Path:
    """HowTo100M.zip unpacked, with its list of videos, and the videos by id in a folder."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "HowTo100M_v1.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "category_1", "category_2", "rank", "task_id"])
        writer.writerow(["nVbIUDjzWY4", "Cars & Other Vehicles", "Motorcycles", 27, 52907])
        writer.writerow(["CTPAZ2euJ2Q", "Cars & Other Vehicles", "Motorcycles", 35, 109057])
        writer.writerow(["_97kyZVWVG0", "Hobbies and Crafts", "Crafts", 34, 119814])
    video(root / "videos" / "nVbIUDjzWY4.mp4", seconds=4)
    video(root / "videos" / "CTPAZ2euJ2Q.webm", seconds=3)
    video(root / "videos" / "_97kyZVWVG0.mp4", seconds=4)
    return root


def something_something(root: Path) -> Path:
    """Something-Something V2: `labels/*.json` and one folder of .webm files."""
    train = [
        {"id": "78687", "label": "holding potato next to vicks vaporub bottle", "template": "Holding [something] next to [something]",
         "placeholders": ["potato", "vicks vaporub bottle"]},
        {"id": "42326", "label": "spreading margarine onto bread", "template": "Spreading [something] onto [something]",
         "placeholders": ["margarine", "bread"]},
    ]  # fmt: skip
    validation = [{"id": "74225", "label": "spinning cube that quickly stops spinning",
                   "template": "Spinning [something] that quickly stops spinning", "placeholders": ["cube"]}]  # fmt: skip
    _json(root / "labels" / "train.json", train)
    _json(root / "labels" / "validation.json", validation)
    _json(root / "labels" / "test.json", [{"id": "1420"}])
    for number in ("78687", "42326", "74225", "1420"):
        video(root / "20bn-something-something-v2" / f"{number}.webm", seconds=3)
    return root


def visual_cot(root: Path) -> Path:
    """deepcs233/Visual-CoT: `viscot_363k.json`, and the images of the unpacked `cot_images_tar_split` below `cot/`."""
    image = Image.new("RGB", (100, 50), "white")
    image.paste("red", (20, 10, 60, 40))
    for name in ("cot/flickr30k/2618322793.jpg", "cot/gqa/2370799.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, quality=95)
    request = "Please provide the bounding box coordinate of the region that can help you answer the question better."
    rows = [
        {"dataset": "flickr30k", "split": "train", "question_id": 0,
         "image": ["cot/flickr30k/2618322793.jpg", "cot/flickr30k/2618322793.jpg###[20, 10, 60, 40]"],
         "conversations": _turns(f"<image>\nWhat colour is the sign? {request}", "[0.200, 0.200, 0.600, 0.800]", "<image>", "It is red.")},
        {"dataset": "gqa", "split": "train", "question_id": 1,
         "image": ["cot/gqa/2370799.png", "cot/gqa/2370799.png###[20, 10, 101, 40]"],
         "conversations": _turns(f"<image>\nIs it large? {request}", "[0.200, 0.200, 1.002, 0.800]", "<image>", "Yes.")},
    ]  # fmt: skip
    _json(root / "viscot_363k.json", rows)
    return root


def vstar(root: Path) -> Path:
    """craigwu/seal_vqa_data: JSON files with named boxes (x, y, width, height), and the images of COCO and GQA beside them."""
    picture(root / "gqa" / "images" / "2370799.jpg", "white", (120, 80))
    picture(root / "coco2017" / "train2017" / "000000033471.jpg", "white", (120, 80))
    picture(root / "coco2014" / "train2014" / "COCO_train2014_000000000009.jpg", "white", (120, 80))
    focus = "Additional visual information to focus on: "
    cup, dog = {"name": "cup", "bbox": [10, 30, 30, 20]}, {"name": "dog", "bbox": [60.5, 30, 70, 40]}  # the second reaches over the edge
    _json(root / "GQA_data.json", [
        {"image": "gqa/images/2370799.jpg", "question": "Is the cup left of the dog?", "answer": "Yes, it is.", "search": True,
         "target_instances": [cup, dog],
         "conversations": _turns(f"<image>\n{focus}<object>; <object>.\nIs the cup left of the dog?", "Yes, it is.")}])  # fmt: skip
    _json(root / "spatial_relation_data.json", [
        {"image": "coco2014/train2014/COCO_train2014_000000000009.jpg", "search": True, "target_instances": [cup],
         "conversations": _turns(f"<image>\n{focus}<object>.\nWhere is the cup?", "On the left.")}])  # fmt: skip
    _json(root / "vaw_attribute_data.json", [
        {"image": "gqa/images/2370799.jpg", "search": True, "target_instances": [cup],
         "conversations": _turns(f"<image>\n{focus}<object>.\nWhat colour is the cup?", "White.")}])  # fmt: skip
    _json(root / "llava_focus_data.json", [
        {"id": "000000033471", "image": "coco2017/train2017/000000033471.jpg", "search": True, "target_instances": [dog],
         "conversations": _turns(f"<image>\n{focus}<object>.\nWhat is there?", "A dog.", "What does it do?", "It sits.")}])  # fmt: skip
    _json(
        root / "negative_data.json",
        [
            {
                "image": "coco2017/train2017/000000033471.jpg",
                "conversations": _turns("<image>\nWhat is on the moon?", "Sorry, it is unclear."),
            }
        ],
    )
    _json(
        root / "llava_instruct_data.json",
        [{"image": "coco2017/train2017/000000033471.jpg", "conversations": _turns("<image>\nWhat is there?", "A dog.")}],
    )
    return root


def instruct_pix2pix(root: Path) -> Path:
    """The authors' clip-filtered-dataset: `seeds.json`, and a folder per prompt with pictures before (_0) and after (_1)."""
    prompts = {
        "shard-00/0000000": ("a field in summer", "make it winter", "a field in winter", ["2015617", "3342233"]),
        "shard-00/0000001": ("a portrait", "as a pencil drawing", "a pencil drawing", ["771"]),
    }
    for name, (before, edit, after, seeds) in prompts.items():
        _json(root / name / "prompt.json", {"caption": before, "edit": edit, "output": after})
        for number, seed in enumerate(seeds):
            picture(root / name / f"{seed}_0.jpg", COLOURS[number])
            picture(root / name / f"{seed}_1.jpg", COLOURS[number + 2])
    _json(root / "seeds.json", [[name, seeds] for name, (*_, seeds) in prompts.items()])
    return root


def instruct_pix2pix_parquet(root: Path) -> Path:
    """timbrooks/instructpix2pix-clip-filtered: Parquet files with embedded images."""
    _parquet(
        root / "data" / "train-00000-of-00001-ab.parquet",
        [
            {"original_prompt": "a field", "original_image": {"bytes": encoded("red"), "path": None}, "edit_prompt": "make it winter",
             "edited_prompt": "a field in winter", "edited_image": {"bytes": encoded("blue"), "path": None}},
            {"original_prompt": "a portrait", "original_image": {"bytes": encoded("green"), "path": None}, "edit_prompt": "as a drawing",
             "edited_prompt": "a drawing", "edited_image": {"bytes": encoded("yellow"), "path": None}},
        ],
    )  # fmt: skip
    return root


def aurora(root: Path) -> Path:
    """The repository of AURORA: `data/NAME/train.json` and `data/NAME/images`."""
    for name, stem in (("ag", "1K0SU.mp4_4"), ("kubric", "0001"), ("magicbrush", "1-img")):
        files = {"input": f"data/{name}/images/{stem}_left.png", "output": f"data/{name}/images/{stem}_right.png"}
        picture(root / files["input"], "red")
        picture(root / files["output"], "blue")
        _json(root / "data" / name / "train.json", [{"instruction": f"Leave the door in {name}", **files}])
    return root


def aurora_parquet(root: Path) -> Path:
    """McGill-NLP/AURORA: Parquet files with embedded images."""
    _parquet(
        root / "data" / "train-00000-of-00093.parquet",
        [
            {"input": {"bytes": encoded("red"), "path": "1K0SU.mp4_4_left.png"}, "instruction": "Leave the door while standing closer",
             "output": {"bytes": encoded("blue"), "path": "1K0SU.mp4_4_right.png"}},
            {"input": {"bytes": encoded("green"), "path": "2.png"}, "instruction": "move the cube left",
             "output": {"bytes": encoded("cyan"), "path": "3.png"}},
        ],
    )  # fmt: skip
    return root


def _parquet(path: Path, rows: list[dict]) -> None:
    """With the type that Hugging Face's `datasets` gives images: a struct of bytes and path."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {name: image if isinstance(value, dict) else pyarrow.string() for name, value in rows[0].items()}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(list(kinds.items()))), path)


# ---- looking at examples ------------------------------------------------------------------------------------


def opened(layout: str, folder: Path, reader: str | None = None, **kwargs: Any):
    """The reader of a data set, on a fixture that is built for it."""
    directory = globals()[layout](folder)
    return importlib.import_module(f"metamorph.data.datasets.{reader or layout}").source(str(directory), **kwargs)


def by_id(source: Any) -> dict[str, Example]:
    """All rows."""
    return {source[index].id: source[index] for index in range(len(source))}


def texts(message: Message) -> list[str]:
    """Its parts that are text."""
    return [part.text for part in message.parts if isinstance(part, TextPart)]


def colour(part: ImagePart) -> tuple[int, ...]:
    """Of the middle of an image, in steps of 64 (JPEG is not exact)."""
    image = open_image(part.image)
    return tuple(round(value / 64) for value in image.getpixel((image.width // 2, image.height // 2)))
