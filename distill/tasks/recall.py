"""What stood in the sequence is asked for: associative recall, induction, selective copying, a needle in noise."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from ..settings import setting
from .task import Task

_PARTS = 4  # of a sequence, by depth


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall, MQAR (Arora et al. 2023, arXiv 2312.04927): keys with their values, then each of
    the keys once, in any order and with gaps between them; at each its value is asked for.

    Gaps follow the power law of the paper's code. Between them is one filler token: the paper has random ones of a
    vocabulary of 8,192, but in a small one these would make other pairs. Values that were asked for do not follow.
    """

    recalls: ClassVar[bool] = True

    pairs: int = setting(8, "keys with values, each asked for once", minimum=1)
    keys: int = setting(32, "keys there are, and values", minimum=2)
    length: int = setting(64, "tokens of a sequence", minimum=4)
    power: float = setting(0.01, "exponent of the gaps: the smaller, the sooner most keys are asked for", above=0)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def symbols(self) -> int:
        return 1 + 2 * self.keys

    def why_not(self) -> str | None:
        if self.pairs > self.keys:
            return f"pairs is {self.pairs}; expected at most keys, {self.keys}"
        return None if self.length >= 4 * self.pairs else f"length is {self.length}; expected at least 4 * pairs"

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        keys = 1 + chance.permutation(self.keys)[: self.pairs]
        values = 1 + self.keys + chance.integers(self.keys, size=self.pairs)
        tokens = np.zeros(self.length, dtype=np.int64)
        tokens[0 : 2 * self.pairs : 2], tokens[1 : 2 * self.pairs : 2] = keys, values
        places = (self.length - 2 * self.pairs) // 2
        weight = np.arange(1.0, places + 1) ** (self.power - 1)
        gaps = chance.choice(places, size=self.pairs, replace=False, p=weight / weight.sum())
        asked = 2 * self.pairs + 2 * gaps
        tokens[asked] = keys
        order = np.argsort(asked)
        return self.asking(tokens, asked[order], values[order])


@dataclass(frozen=True)
class Induction(Task):
    """Induction heads (Fu et al. 2022, arXiv 2212.14052; Olsson et al. 2022): a special token stands once in random
    ones, and again at the end; the token that followed it is asked for."""

    recalls: ClassVar[bool] = True

    kinds: int = setting(16, "tokens there are besides the special one", minimum=2)
    length: int = setting(64, "tokens of a sequence", minimum=3)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def symbols(self) -> int:
        return 1 + self.kinds

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        tokens = 1 + chance.integers(self.kinds, size=self.length)
        place = int(chance.integers(self.length - 2))
        tokens[place] = tokens[-1] = 0
        return self.asking(tokens, np.array([self.length - 1]), tokens[place + 1 : place + 2])


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying (Gu and Dao 2023, arXiv 2312.00752, section 4.1.1; Jing et al. 2019): symbols stand anywhere in
    noise, and at the end, where a marker asks for each, they are to be said in order."""

    recalls: ClassVar[bool] = True

    copied: int = setting(8, "symbols to be copied", minimum=1)
    kinds: int = setting(14, "symbols there are", minimum=2)
    length: int = setting(64, "tokens of a sequence, with the markers", minimum=2)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def symbols(self) -> int:
        return 2 + self.kinds

    def why_not(self) -> str | None:
        return None if self.length >= 2 * self.copied else f"length is {self.length}; expected at least 2 * copied"

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        noise, marker = 0, 1
        tokens = np.full(self.length, noise, dtype=np.int64)
        asked = np.arange(self.length - self.copied, self.length)
        tokens[asked] = marker
        places = np.sort(chance.choice(self.length - self.copied, size=self.copied, replace=False))
        tokens[places] = 2 + chance.integers(self.kinds, size=self.copied)
        return self.asking(tokens, asked, tokens[places])


@dataclass(frozen=True)
class Needle(Task):
    """A needle in a haystack (Kamradt 2023), in tokens: one key with its value hidden in noise, at any depth; the key
    stands again at the end, and its value is asked for. Measured by depth, and at other lengths too."""

    recalls: ClassVar[bool] = True

    keys: int = setting(16, "keys there are, and values, and kinds of noise", minimum=2)
    length: int = setting(64, "tokens of a sequence", minimum=8)
    lengths: list[int] = field(
        default_factory=list, metadata={"help": "further lengths it is measured at", "minimum": 8}
    )
    depth_from: float = setting(0.0, "least depth of the needle, as a part of the sequence", minimum=0, below=1)
    depth_to: float = setting(1.0, "greatest depth", above=0, maximum=1)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def symbols(self) -> int:
        return 3 * self.keys

    def why_not(self) -> str | None:
        if self.depth_from < self.depth_to:
            return None
        return f"depth_from is {self.depth_from}; expected less than depth_to, {self.depth_to}"

    def item(self, chance: np.random.Generator) -> dict[str, Tensor]:
        tokens = chance.integers(self.keys, size=self.length)
        key, value = self.keys + chance.integers(self.keys), 2 * self.keys + chance.integers(self.keys)
        room = self.length - 2  # places of a pair before the question
        first = int(self.depth_from * room)
        place = int(chance.integers(first, max(first + 1, int(self.depth_to * room))))
        tokens[place : place + 2], tokens[-1] = (key, value), key
        return self.asking(tokens, np.array([self.length - 1]), np.array([value]))

    def parts(self) -> Mapping[str, Task]:
        found = {}
        for length in (self.length, *(length for length in self.lengths if length != self.length)):
            for part in range(_PARTS):
                a, b = part / _PARTS, (part + 1) / _PARTS
                found[f"length {length}, depth {a:.0%} to {b:.0%}"] = replace(
                    self, length=length, depth_from=a, depth_to=b
                )
        return found
