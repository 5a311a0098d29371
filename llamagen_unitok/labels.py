"""Class names: what a label is called, and which label a user means.

A bundle holds ``labels.json``, ``{"0": "name", …}``, and may hold ``aliases.json`` beside it,
``{"another name or an emoji": id}``.
"""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path

LABELS_NAME = "labels.json"
ALIASES_NAME = "aliases.json"
EMOJI_PRESENTATION = "\ufe0f"  # may or may not follow a character; means the same class


class ClassNames:
    """The names of classes 0 … len - 1, and the look-up from what a user typed.

    Look-up order: id, emoji character, exact name, alias. Upper and lower case, and the number of spaces, do not count.
    """

    def __init__(self, names: Sequence[str], aliases: Mapping[str, int] | None = None) -> None:
        """Raises ValueError when there is no name, or when an alias points to no class."""
        if not names:
            raise ValueError("there are no class names")
        self.names = list(names)
        self.aliases = dict(aliases or {})
        for alias, label in self.aliases.items():
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(self.names):
                raise ValueError(f"alias {alias!r} points to {label!r}, but class ids are 0 to {len(self.names) - 1}")
        self._by_name: dict[str, list[int]] = {}
        for label, name in enumerate(self.names):
            self._by_name.setdefault(_key(name), []).append(label)
        self._by_character = {_key(a): label for a, label in self.aliases.items() if _is_character(a)}
        self._by_alias = {_key(a): label for a, label in self.aliases.items()}

    @classmethod
    def numbered(cls, count: int) -> ClassNames:
        """Names for classes of which nothing but the number is known."""
        return cls([f"class {label}" for label in range(count)])

    @classmethod
    def load(cls, folder: str | Path) -> ClassNames | None:
        """The names of a bundle, or None when it has none. ValueError names the file when it is malformed."""
        path = Path(folder) / LABELS_NAME
        if not path.exists():
            return None
        by_id = _read_object(path)
        if set(by_id) != {str(label) for label in range(len(by_id))}:
            raise ValueError(f'{path} must name every id from "0" to "{len(by_id) - 1}" once')
        names = [by_id[str(label)] for label in range(len(by_id))]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} must hold names, each a string")
        aliases_path = path.with_name(ALIASES_NAME)
        aliases = _read_object(aliases_path) if aliases_path.exists() else {}
        try:
            return cls(names, aliases)
        except ValueError as error:
            raise ValueError(f"{path.parent}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write labels.json, and aliases.json where there are aliases."""
        by_id = {str(label): name for label, name in enumerate(self.names)}
        for name, values in ((LABELS_NAME, by_id), (ALIASES_NAME, self.aliases)):
            if values:
                text = json.dumps(values, ensure_ascii=False, indent=0) + "\n"
                (folder / name).write_text(text, encoding="utf-8")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, label: int) -> str:
        return self.names[label]

    def find(self, wanted: int | str) -> int:
        """The id of a class given by id, emoji character, name or alias.

        Raises ValueError: an id out of range names the valid ones, an unknown name the nearest known ones.
        """
        if not isinstance(wanted, str):
            return self._in_range(operator.index(wanted))
        label = self._look_up(wanted)
        if label is not None:
            return label
        if _is_number(wanted):
            return self._in_range(int(wanted))
        raise ValueError(f"no class is called {wanted.strip()!r}{self._suggestion(wanted)}")

    def parse(self, text: str) -> list[int]:
        """The ids in a comma-separated list of ids and names, such as ``207,dog``.

        Names may hold commas: of the pieces between commas, the longest run that is a known name counts as one, so a
        text that is a name as a whole is that class. Raises ValueError as `find` does, or when a piece is empty.
        """
        pieces = text.split(",")
        labels = []
        start = 0
        while start < len(pieces):
            for end in range(len(pieces), start + 1, -1):
                label = self._look_up(",".join(pieces[start:end]))
                if label is not None:
                    break
            else:
                end = start + 1
                if not pieces[start].strip():
                    raise ValueError(f"--class {text!r} has an empty name: give ids or names with commas between them")
                label = self.find(pieces[start])
            labels.append(label)
            start = end
        return labels

    def _look_up(self, text: str) -> int | None:
        """The id that `text` means, None if it means none; ValueError if several classes have this name."""
        if _is_number(text) and 0 <= int(text) < len(self):
            return int(text)
        key = _key(text)
        if key in self._by_character:
            return self._by_character[key]
        if len(same := self._by_name.get(key, [])) > 1:
            raise ValueError(f"{text.strip()!r} is the name of classes {', '.join(map(str, same))}: give the id")
        return same[0] if same else self._by_alias.get(key)

    def _in_range(self, label: int) -> int:
        if not 0 <= label < len(self):
            raise ValueError(f"there is no class {label}: ids are 0 to {len(self) - 1}")
        return label

    def _suggestion(self, text: str, most: int = 3, least_likeness: float = 0.6) -> str:
        """End of an error message: up to `most` classes whose name or alias, or a word of it, looks like `text`."""
        wanted = SequenceMatcher(b=_key(text))
        likeness: dict[int, float] = {}
        spellings: Iterable[tuple[str, int]] = (
            *((key, label) for key, labels in self._by_name.items() for label in labels),
            *self._by_alias.items(),
        )
        for key, label in spellings:
            for part in {key, *key.split()}:
                wanted.set_seq1(part)
                if wanted.real_quick_ratio() >= least_likeness and wanted.quick_ratio() >= least_likeness:
                    likeness[label] = max(likeness.get(label, 0.0), wanted.ratio())
        nearest = sorted((label for label in likeness if likeness[label] >= least_likeness), key=lambda n: -likeness[n])
        if not nearest:
            return ": --list-classes shows all names"
        names = ", ".join(f'"{self.names[label]}" ({label})' for label in nearest[:most])
        return f": did you mean {names}? --list-classes shows all names"


def check_class_order(names: ClassNames, folders: Sequence[str]) -> None:
    """Preflight: class i of the generator is subfolder i of a folder of pictures, sorted as image loaders sort them.

    folders: names of the subfolders, such as ImageNet's synsets; anything that `names` finds counts, and numbers that
    sort in their order, such as 007.
    Raises ValueError, in one line, for another number of folders, for one that names no class, or for another order:
    then labels of one do not mean what labels of the other mean.
    """
    check_classes(names, sorted(folders), what="class folder")


def check_classes(names: ClassNames, others: Sequence[str], what: str) -> None:
    """Preflight: class i of `names` is number i of `others`, which `names` may find under any name of the class.

    what: is counted in `others`, for the error. Raises ValueError as `check_class_order` does.
    """
    if len(others) != len(names):
        raise ValueError(f"{len(others)} {what}s do not fit {len(names)} class names")
    for label, other in enumerate(others):
        if other == names[label]:
            continue
        if _is_number(other):
            if int(other) == label:
                continue
            raise ValueError(
                f"{what} {label} is {other!r}, which is a number, and sorting puts 10 before 2: call it after its class"
            )
        found = names.find(other)
        if found != label:
            raise ValueError(
                f"{what} {label} is {other!r}, which is class {found} ({names[found]}), "
                f"but class {label} is {names[label]}: the two are in different orders"
            )


def _key(text: str) -> str:
    """What spellings of one name have in common."""
    text = unicodedata.normalize("NFC", text).replace(EMOJI_PRESENTATION, "")
    return " ".join(text.casefold().split())


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]+\s*", text) is not None


def _is_character(text: str) -> bool:
    """Whether an alias is an emoji (one or several symbols, no letter of a script) rather than a word."""
    return not any(character.isalpha() for character in text) and not text.isascii()


def _read_object(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} must hold a JSON object with at least one entry")
    return values
