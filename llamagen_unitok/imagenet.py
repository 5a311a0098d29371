"""ImageNet-1k: the class names, synsets and order that published generators were trained with, from timm."""

from __future__ import annotations

from collections import Counter

from llamagen_unitok.labels import ClassNames


def imagenet_names() -> ClassNames:
    """The 1,000 classes in the order of their sorted WordNet synsets: 207 is the golden retriever, n02099601.

    A class is named by its first lemma, where no other class is ("crane" is a bird and a machine), else with its synset
    in brackets. Aliases: the synset, every lemma that belongs to no other class, and all lemmas together.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    synsets = info.label_names()
    together = [info.index_to_description(label) for label in range(len(synsets))]
    lemmas = [text.split(", ") for text in together]
    uses = Counter(lemma.casefold() for own in lemmas for lemma in dict.fromkeys(own))
    names = [
        own[0] if uses[own[0].casefold()] == 1 else f"{own[0]} ({synset})"
        for own, synset in zip(lemmas, synsets, strict=True)
    ]
    aliases: dict[str, int] = {}
    for label, (own, synset) in enumerate(zip(lemmas, synsets, strict=True)):
        aliases[synset] = label
        for alias in (*own[1:], together[label]):
            if uses[alias.casefold()] == 1 or (alias == together[label] and len(own) > 1):
                aliases.setdefault(alias, label)
    return ClassNames(names, aliases)
