"""ImageNet's class names: the published order, every spelling that is clear, and the preflight of class order."""

import pytest

from llamagen_unitok.imagenet import imagenet_names
from llamagen_unitok.labels import ClassNames, check_class_order


@pytest.fixture(scope="module")
def names() -> ClassNames:
    return imagenet_names()


@pytest.fixture(scope="module")
def synsets(names) -> list[str]:
    found = sorted(alias for alias in names.aliases if len(alias) == 9 and alias[0] == "n" and alias[1:].isdigit())
    assert len(found) == 1000
    return found


# Facts about ImageNet-1k, not read from where the names come from.
@pytest.mark.parametrize(
    ("wanted", "label"),
    [
        ("golden retriever", 207),
        ("n02099601", 207),
        ("N02099601", 207),
        ("207", 207),
        ("tench", 0),
        ("n01440764", 0),
        ("Tinca tinca", 0),
        ("goldfish", 1),
        ("giant panda", 388),
        ("toilet tissue", 999),
        ("great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias", 2),
    ],
)
def test_a_class_is_found_by_name_synset_and_lemma(names, wanted, label):
    assert names.find(wanted) == label


def test_every_class_has_one_name_and_its_synset_in_sorted_order(names, synsets):
    assert len(names) == len(set(names.names)) == 1000
    for label, (name, synset) in enumerate(zip(names.names, synsets, strict=True)):
        assert names.find(name) == names.find(synset) == label
        assert names.parse(f"{name},{synset}") == [label, label]


def test_a_name_of_two_classes_is_refused_with_both(names):
    with pytest.raises(ValueError, match=r"crane \(n02012849\).* \(134\).*crane \(n03126707\).* \(517\)"):
        names.find("crane")


def test_names_survive_the_bundle(names, tmp_path):
    names.save(tmp_path)
    loaded = ClassNames.load(tmp_path)
    assert loaded.names == names.names and loaded.find("n02099601") == 207


def test_class_folders_in_the_published_order_pass(names, synsets):
    check_class_order(names, synsets)
    check_class_order(names, synsets[::-1])  # loaders sort
    check_class_order(ClassNames(["cat", "dog"], {"n1": 0, "n2": 1}), ["n1", "n2"])


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (lambda s: s[:999], "999 class folders do not fit 1000"),
        (lambda s: [*s[:-1], "n99999999"], "no class is called 'n99999999'"),
        (lambda s: [str(i) for i in range(1000)], "is a number"),
    ],
)
def test_other_class_folders_are_refused_in_one_line(names, synsets, folders, message):
    with pytest.raises(ValueError, match=message) as error:
        check_class_order(names, folders(synsets))
    assert "\n" not in str(error.value)


def test_another_order_names_the_first_difference():
    shuffled = ClassNames(["dog", "cat"], {"n1": 1, "n2": 0})
    with pytest.raises(ValueError, match=r"class folder 0 is 'n1', which is class 1 \(cat\), but class 0 is dog"):
        check_class_order(shuffled, ["n1", "n2"])
