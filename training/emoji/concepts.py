"""The concepts that the text-to-image model draws, and how each is found in the three emoji packages."""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("3d", "flat", "noto", "line")
"""Drawing styles, in the order of the arrays of the data set."""

STYLE_WORDS = {"3d": "3d", "flat": "flat", "noto": "noto", "line": "line drawing"}
"""The words that name a style in a caption."""


@dataclass(frozen=True)
class Concept:
    """One thing to draw.

    Attributes:
        name: The words used in captions.
        code: Lower-case Unicode code point, the key of the 3d and the Noto package.
        slug: File name in the Fluent package.
    """

    name: str
    code: str
    slug: str

    @property
    def caption(self) -> str:
        """The name with its article, as in `an owl`."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


# name:code point[:slug, where it is not the name]. Where a face and a body exist, the plain word is the face.
_ANIMALS = """
cat:1f431:cat-face dog:1f436:dog-face horse:1f434:horse-face monkey:1f435:monkey-face rabbit:1f430:rabbit-face
zebra:1f993 spider:1f577-fe0f bird:1f426 sheep:1f411:ewe deer:1f98c cow:1f42e:cow-face goat:1f410 lion:1f981
tiger:1f42f:tiger-face bear:1f43b raccoon:1f99d fox:1f98a wolf:1f43a lizard:1f98e beetle:1fab2 ant:1f41c
butterfly:1f98b fish:1f41f shark:1f988 whale:1f433:spouting-whale dolphin:1f42c squirrel:1f43f-fe0f:chipmunk
mouse:1f42d:mouse-face rat:1f400 snake:1f40d turtle:1f422 frog:1f438 chicken:1f414 duck:1f986 goose:1fabf
bee:1f41d:honeybee pig:1f437:pig-face turkey:1f983 fly:1fab0 llama:1f999 camel:1f42a bat:1f987 gorilla:1f98d
hedgehog:1f994 kangaroo:1f998
"""
_UNSEEN = """
panda:1f43c elephant:1f418 giraffe:1f992 penguin:1f427 koala:1f428 owl:1f989 octopus:1f419 hippopotamus:1f99b
"""
_DRIFT = "red_car:1f697:automobile hamburger:1f354 green_apple:1f34f rocket:1f680"
_OTHERS = """
hamster:1f439 unicorn:1f984 rhinoceros:1f98f crocodile:1f40a crab:1f980 lobster:1f99e snail:1f40c
ladybug:1f41e:lady-beetle rooster:1f413 chick:1f425:front-facing-baby-chick parrot:1f99c swan:1f9a2
flamingo:1f9a9 tropical_fish:1f420 jellyfish:1fabc dragon:1f409 pine_tree:1f332:evergreen-tree
palm_tree:1f334 cactus:1f335 mushroom:1f344 tulip:1f337 rose:1f339 sunflower:1f33b banana:1f34c
grapes:1f347 watermelon:1f349 orange:1f34a:tangerine lemon:1f34b pineapple:1f34d strawberry:1f353
carrot:1f955 pizza:1f355 doughnut:1f369 cupcake:1f9c1 ice_cream:1f366:soft-ice-cream bus:1f68c
tractor:1f69c helicopter:1f681 airplane:2708-fe0f sailboat:26f5 train:1f682:locomotive house:1f3e0
castle:1f3f0 volcano:1f30b snowman:26c4:snowman-without-snow umbrella:2602-fe0f
sun:1f31e:sun-with-face star:2b50 rainbow:1f308 balloon:1f388 gift:1f381:wrapped-gift
soccer_ball:26bd guitar:1f3b8 crown:1f451 bell:1f514 teddy_bear:1f9f8 robot:1f916 anchor:2693
pumpkin:1f383:jack-o-lantern
"""


def _parse(rows: str) -> list[Concept]:
    """Read rows of `name:code[:slug]`, with underscores for spaces in names."""
    concepts = []
    for row in rows.split():
        name, code, *slug = row.split(":")
        concepts.append(Concept(name.replace("_", " "), code, slug[0] if slug else name.replace("_", "-")))
    return concepts


ANIMALS = _parse(_ANIMALS)
"""The 45 simple animals of the DDPO and AlignProp papers."""

UNSEEN = _parse(_UNSEEN)
"""Animals that the base model knows and that no reward training may use."""

DRIFT = _parse(_DRIFT)
"""Things that are no animals, to watch for drift."""

SHEET = [*ANIMALS, *UNSEEN, *DRIFT]
"""The prompts of the contact sheet."""

CONCEPTS = [*SHEET, *_parse(_OTHERS)]
"""Everything that the text-to-image model is trained to draw."""


def caption(concept: Concept, style: str | None = None) -> str:
    """The caption of a concept, with or without its style: `a fox` or `a fox, line drawing`."""
    return concept.caption if style is None else f"{concept.caption}, {STYLE_WORDS[style]}"
