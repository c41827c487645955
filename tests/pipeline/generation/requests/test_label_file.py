"""Label plans as files: the same rows from both kinds, and one line for each mistake, with file and line."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import ModelConfig
from pipeline.errors import ConfigError
from pipeline.generation.requests.class_names import ClassNames
from pipeline.generation.requests.label_file import parse_label_plan
from pipeline.generation.spec.labels import LabelPlan
from pipeline.models.model_files import ModelCard

NAMES = ("cat", "dog", "ibis")


def classes_of(names: tuple[str, ...] = NAMES, num_classes: int | None = 3) -> ClassNames:
    config = ModelConfig(image_size=(32, 32), channels=1, num_classes=num_classes)
    return ClassNames(ModelCard(config=config, class_names=names), "models:/pets/1")


CLASSES = classes_of()


def rows(plan: LabelPlan) -> list[tuple[int, int, str]]:
    ids = plan.caller_ids
    return [(int(plan.labels[i]), plan.noise_id(i), "" if ids is None else ids[i]) for i in range(len(plan))]


def test_both_kinds_say_the_same() -> None:
    text = '\ufefflabel, noise_id, id\n\ncat,7,a-1\r\n2,,"b, ""2"""\n1,281474976710655,\n"dog",,é\n'
    table = parse_label_plan(text.encode(), "x.csv", CLASSES)
    lines = [
        {"label": "cat", "noise_id": 7, "id": "a-1"},
        {"label": 2, "noise_id": None, "id": 'b, "2"'},
        {"id": "", "noise_id": 2**48 - 1, "label": "1"},
        {"label": "dog", "id": "é"},
    ]
    objects = parse_label_plan("\n\n".join(map(json.dumps, lines)).encode(), "x.jsonl", CLASSES)
    assert rows(table) == rows(objects) == [(0, 7, "a-1"), (2, 1, 'b, "2"'), (1, 2**48 - 1, ""), (1, 3, "é")]
    (only,) = rows(parse_label_plan(b"label\n1\n", "x.csv", CLASSES))
    assert only == (1, 0, "")


@given(
    given=st.lists(
        st.tuples(st.integers(0, 2), st.none() | st.integers(0, 2**48 - 1), st.text(max_size=9)),
        min_size=1,
        max_size=30,
    )
)
def test_rows_come_back_as_they_were_written(given: list[tuple[int, int | None, str]]) -> None:
    lines = [json.dumps({"label": label, "noise_id": noise, "id": text}) for label, noise, text in given]
    plan = parse_label_plan("\n".join(lines).encode(), "x.jsonl", CLASSES)
    assert rows(plan) == [
        (label, index if noise is None else noise, text) for index, (label, noise, text) in enumerate(given)
    ]


def test_a_name_goes_before_a_number_and_a_number_is_one() -> None:
    numbers = classes_of(("1", "0", "00"))
    assert [numbers.find(label) for label in ("1", "0", "00", "2", 1, 0, 3, -1, "3")] == [
        0, 1, 2, 2, 1, 0, None, None, None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "p.csv",
            "label\ncat\nzebra\n",
            "p.csv, line 3: label: must be one of cat, dog, ibis (or 0 to 2), got 'zebra'",
        ),
        ("p.csv", "label,id\n\ncat,x\n,y\n", "p.csv, line 4: label: .*got nothing"),
        ("p.csv", "label\n3\n", "p.csv, line 2: label: .*got '3'"),
        ("p.csv", 'label,id\ncat,"a\nb"\n5,\n', "p.csv, line 4: label: .*got '5'"),
        ("p.csv", "0\n1\n", "p.csv, line 1: must name the columns, .*got '0'; write label,noise_id,id"),
        ("p.csv", "label,seed\n", "p.csv, line 1: must name the columns, .*got 'label', 'seed'"),
        ("p.csv", "label,label\n", "p.csv, line 1: must name the columns"),
        ("p.csv", "label;id\n", "p.csv, line 1: must name the columns, .*got 'label;id'"),
        ("p.csv", "label\n0\n0,7\n", "p.csv, line 3: must have 1 values, as the first line has, got 2"),
        ("p.csv", 'label\n"0\n', "p.csv, line 2: is not CSV: unexpected end"),
        ("p.csv", "label,noise_id\n0,-1\n", "p.csv, line 2: noise_id: must be a whole number .*got '-1'"),
        ("p.csv", "label,noise_id\n0,1_0\n", "p.csv, line 2: noise_id: .*got '1_0'"),
        ("p.csv", "label,noise_id\n0,281474976710656\n", "p.csv, line 2: noise_id: .*got 281474976710656"),
        ("p.csv", "label,noise_id\n0," + "9" * 5000, "p.csv, line 2: noise_id: .*got '99999"),
        ("p.csv", "", "p.csv: has no rows"),
        ("p.csv", "label,id\n\n", "p.csv: has no rows"),
        ("p.jsonl", "\n", "p.jsonl: has no rows"),
        ("p.jsonl", '{"label": 0}\n{"label": 0\n', "p.jsonl, line 2: is not JSON"),
        ("p.ndjson", '{"label": 0}\n\n3\n', 'p.ndjson, line 3: must be an object such as {"label": 3}, got 3'),
        ("p.jsonl", '{"label": true}', "p.jsonl, line 1: label: .*got True"),
        ("p.jsonl", '{"id": "x"}', "p.jsonl, line 1: label: .*got nothing"),
        ("p.jsonl", '{"label": 0.0}', "p.jsonl, line 1: label: .*got 0.0"),
        ("p.jsonl", '{"label": 0, "noise": 3}', "p.jsonl, line 1: has 'noise', which is none of label, noise_id, id"),
        ("p.jsonl", '{"label": 0, "noise_id": 1.0}', "p.jsonl, line 1: noise_id: .*got 1.0"),
        ("p.jsonl", '{"label": 0, "noise_id": true}', "p.jsonl, line 1: noise_id: .*got True"),
        ("p.jsonl", '{"label": 0, "id": 0}', "p.jsonl, line 1: id: must be a text, got 0"),
        ("p.jsonl", '{"label": 0, "id": "\\ud800"}', "p.jsonl, line 1: id: must be a text"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_line(name: str, text: str, words: str) -> None:
    pattern = words.replace("(", r"\(").replace(")", r"\)").replace("{", r"\{")
    with pytest.raises(ConfigError, match=rf"^request\.label_plan: {pattern}") as caught:
        parse_label_plan(text.encode(), name, CLASSES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_what_is_no_text_is_found_with_its_line(name: str) -> None:
    first = "label,id\ncat,x\n" if name == "p.csv" else '{"label": 0}\n{"label": 0}\n'
    with pytest.raises(ConfigError, match=rf"^request\.label_plan: {name}, line 3: byte 0xff is not UTF-8"):
        parse_label_plan(first.encode() + b"\xff\n", name, CLASSES)


def test_a_model_without_classes_has_no_label_plan() -> None:
    with pytest.raises(ConfigError, match=r"^request\.label_plan: models:/pets/1 has no classes"):
        parse_label_plan(b"label\n0\n", "p.csv", classes_of((), None))


def test_many_rows_take_little_memory() -> None:
    num_rows = 100_000
    data = ("label,noise_id,id\n" + "".join(f"{i % 3},{i},job-{i:07d}\n" for i in range(num_rows))).encode()
    tracemalloc.start()
    plan = parse_label_plan(data, "p.csv", CLASSES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(plan) == num_rows and plan.caller_ids is not None and plan.caller_ids[77_777] == "job-0077777"
    assert peak < 60 * num_rows, "arrays that grow are copied once in a while; as objects it would be 300 each"


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (("ibis", "cat"), (2, 0)),
        (("2,0",), (2, 0)),
        (("dog, cat", 2), (1, 0, 2)),
        ((1,), (1,)),
    ],
)
def test_classes_are_chosen_by_name_or_number(asked: tuple[str | int, ...], chosen: tuple[int, ...]) -> None:
    assert CLASSES.choose(asked, "request.classes") == chosen


def test_a_name_with_a_comma_is_taken_whole() -> None:
    assert classes_of(("tench, Tinca tinca", "a", "b")).choose(("tench, Tinca tinca", "a,b"), "x") == (0, 1, 2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("cat", "cow"), r"has the classes cat, dog, ibis \(or 0 to 2\), got 'cow'; choose of these"),
        ((3,), r"got 3;"),
        (("0,",), r"got '';"),
        (("cat", "1", "0"), r"each class once, got number 0 twice, as 'cat' and as '0'"),
        (("0,1,0",), r"each class once, got number 0 twice"),
    ],
)
def test_choices_that_make_no_sense_are_refused_by_name(asked: tuple[str | int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^request\.classes: .*{words}"):
        CLASSES.choose(asked, "request.classes")


def test_a_model_without_classes_has_none_to_choose() -> None:
    with pytest.raises(ConfigError, match=r"^request\.classes: models:/pets/1 has no classes"):
        classes_of((), None).choose(("0",), "request.classes")
