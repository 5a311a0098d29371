"""Class names: which label a user means, and what is said when there is none."""

import csv
import json
from pathlib import Path

import pytest

from llamagen_unitok.labels import ClassNames
from tests.conftest import ALIASES, NAMES

CLASSES = Path(__file__).resolve().parents[1] / "demo" / "classes.tsv"


@pytest.fixture
def names() -> ClassNames:
    return ClassNames(NAMES, ALIASES)


@pytest.fixture(scope="module")
def emoji() -> ClassNames:
    with open(CLASSES, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    aliases: dict[str, int] = {}
    for row in rows:
        for alias in (row["emoji"], *filter(None, row["aliases"].split("|"))):
            aliases.setdefault(alias, int(row["id"]))
    return ClassNames([row["name"] for row in rows], aliases)


@pytest.mark.parametrize(
    ("wanted", "label"),
    [(2, 2), ("2", 2), (" 2 ", 2), ("pig", 2), ("PIG", 2), ("zebra  face", 1), ("🐷", 2), ("doggo", 0), ("☺", 4)],
)
def test_a_class_is_found_by_id_emoji_name_and_alias(names, wanted, label):
    assert names.find(wanted) == label


def test_ids_come_before_names_and_names_before_aliases():
    names = ClassNames(["1", "dog", "cat"], {"dog": 2})
    assert names.find("1") == 1
    assert names.find("dog") == 1


def test_an_emoji_comes_before_a_name():
    assert ClassNames(["🐷", "pig"], {"🐷": 1}).find("🐷") == 1


@pytest.mark.parametrize("wanted", [5, "5", -1, "-1"])
def test_an_id_out_of_range_names_the_valid_ones(names, wanted):
    with pytest.raises(ValueError, match=r"no class -?\d+: ids are 0 to 4"):
        names.find(wanted)


def test_a_number_out_of_range_may_still_be_a_name_or_an_alias():
    names = ClassNames(["dog", "1984"], {"1234": 0})
    assert names.find("1234") == 0
    assert names.find("1984") == 1


def test_a_misspelt_name_gets_the_nearest_ones(names, emoji):
    for known in (names, emoji):
        with pytest.raises(ValueError, match=r"no class is called 'zebrra': did you mean \"zebra face\""):
            known.find("zebrra")
    with pytest.raises(ValueError, match=r"did you mean .*tiger"):
        emoji.find("tigger")
    with pytest.raises(ValueError, match="--list-classes shows all names"):
        emoji.find("qqqqqqqq")


def test_an_alias_is_suggested_under_the_name_of_its_class(names):
    with pytest.raises(ValueError, match=r'"dog" \(0\)'):
        names.find("doggoo")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("207", None),
        ("2,dog", [2, 0]),
        ("dog, zebra face ,2", [0, 1, 2]),
        ("hot dog, plain", [3]),
        ("pig,hot dog, plain,cat", [2, 3, 4]),
        ("pig,pig", [2, 2]),
    ],
)
def test_a_list_is_split_at_commas_but_not_inside_a_known_name(names, text, labels):
    if labels is None:
        with pytest.raises(ValueError, match="no class 207"):
            names.parse(text)
    else:
        assert names.parse(text) == labels


@pytest.mark.parametrize("text", ["", " ", "dog,", ",dog", "dog,,pig"])
def test_an_empty_name_in_a_list_is_refused(names, text):
    with pytest.raises(ValueError, match="empty name"):
        names.parse(text)


def test_a_name_of_several_classes_asks_for_the_id():
    with pytest.raises(ValueError, match="'crane' is the name of classes 0, 2: give the id"):
        ClassNames(["crane", "dog", "Crane"]).find("crane")


def test_every_emoji_class_is_found_by_its_id_emoji_and_name(emoji):
    assert len(emoji) == 1000
    assert emoji.find("pig") == emoji.find("🐖") == 207
    assert emoji.find("dog") == 180
    for label, name in enumerate(emoji.names):
        assert emoji.find(str(label)) == label
        assert emoji.find(name) == label or name.isdigit()


def test_names_survive_saving(names, tmp_path):
    names.save(tmp_path)
    loaded = ClassNames.load(tmp_path)
    assert (loaded.names, loaded.aliases) == (names.names, names.aliases)


def test_a_folder_without_labels_has_no_names(tmp_path):
    assert ClassNames.load(tmp_path) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ('{"0": "a", "2": "b"}', "every id"), ('{"0": 3}', "string")],
)
def test_malformed_labels_name_the_file(tmp_path, labels, message):
    (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(ValueError, match=rf"labels\.json .*{message}"):
        ClassNames.load(tmp_path)


def test_an_alias_of_no_class_is_refused(tmp_path):
    ClassNames(NAMES).save(tmp_path)
    (tmp_path / "aliases.json").write_text(json.dumps({"x": 5}))
    with pytest.raises(ValueError, match="alias 'x' points to 5"):
        ClassNames.load(tmp_path)
