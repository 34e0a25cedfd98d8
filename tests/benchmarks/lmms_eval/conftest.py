"""Data sets of a few rows in the real schemas, and the cache of unpruned answers apart."""

import json
from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw

if find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    for name in ("OPENAI_API_KEY", "AZURE_API_KEY", "VLM_PRUNE_DATA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def picture(number):
    image = Image.new("RGB", (80, 60), "white")
    ImageDraw.Draw(image).rectangle((5 + 9 * number, 10, 30 + 9 * number, 40), fill="red")
    return image


def gqa():
    questions = [
        {
            "id": f"2{i:06d}",
            "imageId": f"n{i // 2}",
            "question": f"Is there a box number {i}?",
            "isBalanced": True,
            "groups": {"global": "", "local": "03-box"},
            "answer": "yes" if i % 2 else "no",
            "fullAnswer": "Yes.",
            "semanticStr": "select: box [0]",
            "types": {"structural": "verify", "semantic": "obj", "detailed": "existC"},
        }
        for i in range(4)
    ]
    pictures = [{"id": f"n{i}", "image": picture(i)} for i in (1, 0)]
    return {
        "GQA/testdev_balanced_instructions/testdev": questions,
        "GQA/testdev_balanced_images/testdev": pictures,
    }


def pope():
    rows = [
        {
            "id": str(i),
            "question_id": str(i + 1),
            "question": "Is there a box in the image?",
            "answer": "yes" if i % 2 else "no",
            "image_source": f"COCO_val2014_{i:012d}",
            "image": picture(i),
            "category": "adversarial",
        }
        for i in range(4)
    ]
    return {"POPE/data/test": rows}


def textvqa():
    rows = [
        {
            "image_id": f"0054c9{i}",
            "question_id": 34602 + i,
            "question": "what color is the box?",
            "question_tokens": ["what", "color", "is", "the", "box"],
            "image": picture(i),
            "image_width": 80,
            "image_height": 60,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": ["red"] * 7 + ["crimson"] * 3,
            "image_classes": ["Box"],
            "set_name": "val",
            "ocr_name": "",
            "ocr_tokens": ["RED"],
        }
        for i in range(3)
    ]
    return {"textvqa/data/validation": rows}


def vqav2():
    rows = [
        {
            "question_type": "what color is the",
            "multiple_choice_answer": "red",
            "answers": [
                {"answer": "red", "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)
            ],
            "image_id": 262148 + i,
            "answer_type": "other",
            "question_id": 262148000 + i,
            "question": "What color is the box?",
            "image": picture(i),
        }
        for i in range(3)
    ]
    return {"VQAv2/data/validation": rows}


def mmbench():
    rows = [
        {
            "index": 241 + i,
            "question": "What color is the box?",
            "hint": "nan",
            "answer": "ABCD"[i],
            "A": "red",
            "B": "blue",
            "C": "green",
            "D": "nan" if i < 3 else "black",
            "category": "attribute_recognition",
            "image": picture(i),
            "source": "reasoning",
            "L2-category": "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for i in range(4)
    ]
    return {"MMBench/en/dev": rows}


def scienceqa():
    rows = [
        {
            "image": picture(i),
            "question": "Which color has the box?",
            "choices": ["red", "blue"],
            "answer": i % 2,
            "hint": "Look at the picture." if i else "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "topic": "physics",
            "category": "Materials",
            "skill": "Identify colors",
            "lecture": "",
            "solution": "",
        }
        for i in range(3)
    ]
    return {"ScienceQA/ScienceQA-IMG/test": rows}


def mme():
    rows = [
        {
            "question_id": f"color/000{i // 2}.jpg",
            "image": picture(i // 2),
            "question": f"Is the box {shade}? Please answer yes or no.",
            "answer": answer,
            "category": "color",
        }
        for i, (shade, answer) in enumerate([("red", "Yes"), ("blue", "No")] * 2)
    ]
    return {"MME/data/test": rows}


def mmmu():
    rows = [
        {
            "id": f"validation_Art_{i + 1}",
            "question": "<image 1> What color is the box?",
            "options": "['red', 'blue']",
            "explanation": "",
            **{f"image_{k}": picture(i) if k == 1 else None for k in range(1, 8)},
            "img_type": "['Paintings']",
            "answer": "A",
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Drawing",
        }
        for i in range(2)
    ]
    return {"MMMU/data/validation": rows}


def hellaswag():
    rows = [
        {
            "ind": i,
            "activity_label": "Boxing",
            "ctx_a": "A man opens a box.",
            "ctx_b": "he",
            "ctx": "A man opens a box. he",
            "endings": ["looks inside.", "is red.", "flies.", "counts to seven and leaves."],
            "source_id": "activitynet~v_1",
            "split": "val",
            "split_type": "indomain",
            "label": str(i),
        }
        for i in range(3)
    ]
    return {"hellaswag/data/validation": rows, "hellaswag/data/train": rows}


def gsm8k():
    rows = [
        {"question": f"What is {i} plus 1?", "answer": f"It is more. #### {i + 1}"}
        for i in range(8)
    ]
    return {"gsm8k/main/train": rows, "gsm8k/main/test": rows[:3]}


def mmlu():
    rows = [
        {
            "question": f"Which bone is number {i}?",
            "subject": "anatomy",
            "choices": ["ulna", "femur", "tibia", "radius"],
            "answer": i,
        }
        for i in range(4)
    ]
    return {"mmlu_no_train/anatomy/test": rows[:2], "mmlu_no_train/anatomy/dev": rows}


def ifeval():
    rows = [
        {
            "key": 1000 + i,
            "prompt": "Name a color without commas, in two highlighted sections.",
            "instruction_id_list": [
                "punctuation:no_comma", "detectable_format:number_highlighted_sections"
            ],
            "kwargs": [
                {"num_highlights": None, "relation": None},
                {"num_highlights": 2, "relation": None},
            ],
        }
        for i in range(2)
    ]  # fmt: skip
    return {"instruction-following-eval/data/train": rows}


@pytest.fixture(scope="session")
def json_root(tmp_path_factory):
    """Those of images as JSON, one row a line, images in files of their own."""
    root = tmp_path_factory.mktemp("json")
    for make in (pope, textvqa, vqav2, mmbench, scienceqa):
        ((name, rows),) = make().items()
        folder = root / name.split("/")[0]
        (root / name).parent.mkdir(parents=True)
        (folder / "pictures").mkdir()
        for number, row in enumerate(rows):
            row["image"].save(folder / "pictures" / f"{number}.png")
            row["image"] = f"pictures/{number}.png"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name).with_suffix(".jsonl").write_text(lines)
    questions, pictures = gqa().values()  # one object by id, as its authors give it
    (root / "GQA" / "images").mkdir(parents=True)
    for row in pictures:
        row["image"].save(root / "GQA" / "images" / f"{row['id']}.jpg", "PNG")  # without loss
    by_id = json.dumps({row.pop("id"): row for row in questions})
    (root / "GQA" / "testdev_balanced_instructions.json").write_text(by_id)
    return root


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """All of them as Parquet files, images inside, named as the Hub names shards."""
    import datasets

    root = tmp_path_factory.mktemp("data")
    makers = (
        gqa, pope, textvqa, vqav2, mmbench, scienceqa, mme, mmmu, hellaswag, gsm8k, mmlu, ifeval,
    )  # fmt: skip
    for make in makers:
        for name, rows in make().items():
            table = datasets.Dataset.from_list(rows)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(f"{root / name}-00000-of-00001.parquet")
    return root
