"""Questions and captions about scenes, and questions that need no image.

Each question has exactly one right answer. A question about an image also says, for each phrase that names something,
in which cells the named things lie (`Grounding`): training uses it as an additional target, the benchmark does not.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import Formatter

from lvlm_prune.demo.facts import COUNTRIES, FACT_WORDINGS, SIGN_MEANINGS
from lvlm_prune.demo.splits import Split, split_of, stable_hash
from lvlm_prune.demo.world import COLORS, PLACES, SHAPES, Scene, Thing

VISION_TASKS: tuple[str, ...] = (
    "existence",
    "counting",
    "color",
    "shape",
    "place",
    "relation",
    "reading",
    "reading_arithmetic",
    "symbol",
)
TEXT_TASKS: tuple[str, ...] = ("arithmetic", "facts", "sorting", "comparing")

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Grounding:
    """The phrase that ends before character ``end`` of the question names the things in ``cells``."""

    end: int
    cells: tuple[int, ...]


@dataclass(frozen=True)
class QuestionAnswer:
    """A question with its one right answer; ``task`` is one of ``VISION_TASKS``, ``TEXT_TASKS`` or ``caption``."""

    task: str
    question: str
    answer: str
    groundings: tuple[Grounding, ...] = ()


def _ask(task: str, wording: str, answer: str, **phrases: tuple[str, tuple[int, ...]]) -> QuestionAnswer:
    """Fill the phrases, each given as (text, cells), into the wording and note where they end."""
    text, groundings = "", []
    for literal, field, _, _ in Formatter().parse(wording):
        text += literal
        if field is not None:
            phrase, cells = phrases[field]
            text += phrase
            groundings.append(Grounding(len(text), cells))
    return QuestionAnswer(task, text, answer, tuple(groundings))


def plural(shape: str) -> str:
    """`star` -> `stars`, `cross` -> `crosses`."""
    return shape + ("es" if shape == "cross" else "s")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def direction(thing: Thing, other: Thing) -> str | None:
    """Where ``thing`` lies seen from ``other``; None unless they share a row or a column.

    Example:
        >>> direction(Thing("red", "star", "small", 0), Thing("blue", "circle", "large", 2))
        'left'
    """
    (row, column), (other_row, other_column) = divmod(thing.cell, 3), divmod(other.cell, 3)
    if row == other_row:
        return "left" if column < other_column else "right"
    if column == other_column:
        return "above" if row < other_row else "below"
    return None


def _existence(scene: Scene, rng: Random) -> QuestionAnswer:
    present = sorted({(thing.color, thing.shape) for thing in scene.things})
    if rng.random() < 0.5:
        color, shape = rng.choice(present)
    else:
        seen_color, seen_shape = rng.choice(present)
        absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
        # mostly near misses: one of the two properties is there
        near = [pair for pair in absent if (pair[0] == seen_color) != (pair[1] == seen_shape)]
        color, shape = rng.choice(near if rng.random() < 0.8 else absent)
    cells = tuple(thing.cell for thing in scene.things if (thing.color, thing.shape) == (color, shape))
    wording = rng.choice(("Is there {article} {thing}?", "Do you see {article} {thing}?"))
    wording = wording.replace("{article}", _article(color))
    return _ask("existence", wording, "yes" if cells else "no", thing=(f"{color} {shape}", cells))


def _counting(scene: Scene, rng: Random) -> QuestionAnswer:
    kind = rng.choice(("all", "shape", "shape", "color"))
    things = scene.things
    if kind == "shape":
        shape = rng.choice(things).shape if rng.random() < 0.8 else rng.choice(SHAPES)
        name, things = plural(shape), tuple(thing for thing in things if thing.shape == shape)
    elif kind == "color":
        color = rng.choice(things).color if rng.random() < 0.8 else rng.choice(list(COLORS))
        name, things = f"{color} objects", tuple(thing for thing in things if thing.color == color)
    else:
        name = "objects"
    wording = rng.choice(("How many {things} are there?", "Count the {things}."))
    return _ask("counting", wording, _NUMBERS[len(things)], things=(name, tuple(thing.cell for thing in things)))


def vision_questions(scene: Scene, rng: Random) -> list[QuestionAnswer]:
    """One question for each task that the scene allows, in the order of ``VISION_TASKS``.

    Example:
        >>> [qa.answer for qa in vision_questions(Scene((Thing("red", "star", "small", 0),), "white"), Random(2))]
        ['no', 'one', 'red', 'star', 'top left', 'airport']
    """
    things = scene.things
    colors, shapes = [thing.color for thing in things], [thing.shape for thing in things]
    by_shape = [(thing.shape, thing) for thing in things if shapes.count(thing.shape) == 1]
    by_color = [(f"{thing.color} object", thing) for thing in things if colors.count(thing.color) == 1]
    by_both = [(thing.name, thing) for thing in things if sum(other.name == thing.name for other in things) == 1]
    asked = [_existence(scene, rng), _counting(scene, rng)]

    def ask(task: str, wordings: tuple[str, ...], named: tuple[str, Thing], answer: str) -> None:
        name, thing = named
        asked.append(_ask(task, rng.choice(wordings), answer, thing=(name, (thing.cell,))))

    if by_shape:
        named = rng.choice(by_shape)
        ask("color", ("What color is the {thing}?", "Name the color of the {thing}."), named, named[1].color)
    if by_color:
        named = rng.choice(by_color)
        ask("shape", ("What shape is the {thing}?", "Name the shape of the {thing}."), named, named[1].shape)
    if by_shape or by_color:
        named = rng.choice(by_shape + by_color)
        ask("place", ("Where is the {thing}?", "Name the place of the {thing}."), named, PLACES[named[1].cell])
    pairs = [(one, two) for one in by_both for two in by_both if one is not two and direction(one[1], two[1])]
    if pairs:
        (name, thing), (other_name, other) = rng.choice(pairs)
        wording = rng.choice(("Where is the {thing} from the {other}?", "From the {other}, where is the {thing}?"))
        phrases = {"thing": (name, (thing.cell,)), "other": (other_name, (other.cell,))}
        asked.append(_ask("relation", wording, direction(thing, other) or "", **phrases))
    if scene.number is not None and scene.number_cell is not None:
        number = ("number", (scene.number_cell,))
        wording = rng.choice(("What {thing} is written?", "Read the {thing}."))
        asked.append(_ask("reading", wording, str(scene.number), thing=number))
        step = rng.randint(1, 5)
        wording = rng.choice((f"What is the {{thing}} plus {step}?", f"Add {step} to the {{thing}}."))
        asked.append(_ask("reading_arithmetic", wording, str(scene.number + step), thing=number))
    if by_color:
        named = rng.choice([(name.replace("object", "sign"), thing) for name, thing in by_color])
        meaning = SIGN_MEANINGS[named[1].color, named[1].shape]
        ask("symbol", ("What does the {thing} mean?", "Name the meaning of the {thing}."), named, meaning)
    return asked


def caption(scene: Scene, rng: Random) -> QuestionAnswer:
    """A request to describe the image, and a true description of 40 to 100 words."""
    things = sorted(scene.things, key=lambda thing: thing.cell)
    count = "one object" if len(things) == 1 else f"{_NUMBERS[len(things)]} objects"
    sentences = [f"The image shows {count} on a {scene.background} background."]
    sentences += [f"A {thing.size} {thing.name} is at the {PLACES[thing.cell]}." for thing in things]
    if scene.number is not None and scene.number_cell is not None:
        sentences.append(f"The number {scene.number} is written at the {PLACES[scene.number_cell]}.")
    else:
        sentences.append("No number is written in the image.")
    more = [f"The {thing.name} means {SIGN_MEANINGS[thing.color, thing.shape]}." for thing in things]
    for one, two in pairwise(things):
        if side := direction(one, two):
            more.append(f"The {one.name} is {side}{' of' if side in ('left', 'right') else ''} the {two.name}.")
    for shape in sorted({thing.shape for thing in things}):
        number = sum(thing.shape == shape for thing in things)
        more.append(f"There is one {shape}." if number == 1 else f"There are {_NUMBERS[number]} {plural(shape)}.")
    rng.shuffle(more)
    taken = {thing.cell for thing in things} | {scene.number_cell}
    more += [f"The {place} is empty." for cell, place in enumerate(PLACES) if cell not in taken]
    wanted = rng.randint(45, 80)
    while sum(len(sentence.split()) for sentence in sentences) < wanted and more:
        sentences.append(more.pop(0))
    request = rng.choice(("Describe the image.", "What is in the picture?", "Write a detailed caption."))
    return QuestionAnswer("caption", request, " ".join(sentences))


def _arithmetic(rng: Random) -> tuple[str, QuestionAnswer]:
    largest = rng.choice((20, 49))
    one, two = rng.randint(0, largest), rng.randint(0, largest)
    low, high = min(one, two), max(one, two)
    if rng.random() < 0.5:
        wording = rng.choice((f"What is {one} plus {two}?", f"Add {one} and {two}."))
        return f"{low} + {high}", QuestionAnswer("arithmetic", wording, str(one + two))
    wording = rng.choice((f"What is {high} minus {low}?", f"Take {low} from {high}."))
    return f"{high} - {low}", QuestionAnswer("arithmetic", wording, str(high - low))


def _sorting(rng: Random) -> tuple[str, QuestionAnswer]:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 4)
    in_order = " ".join(sorted(letters))
    wording = rng.choice(("Sort the letters {}.", "Put in order: {}."))
    return f"sort {in_order}", QuestionAnswer("sorting", wording.format(" ".join(letters)), in_order)


def _comparing(rng: Random) -> tuple[str, QuestionAnswer]:
    one, two = rng.sample(range(10, 100), 2)
    word, answer = rng.choice((("larger", max(one, two)), ("smaller", min(one, two))))
    wording = rng.choice(("Which is {}, {} or {}?", "Name the {} of {} and {}."))
    key = f"compare {min(one, two)} {max(one, two)}"
    return key, QuestionAnswer("comparing", wording.format(word, one, two), str(answer))


def fact_wording(kind: str, country: str, split: Split, rng: Random) -> str:
    """A wording in which this fact is asked in this split: three of the six in training, one in each other split."""
    ranked = sorted(FACT_WORDINGS[kind], key=lambda wording: stable_hash(f"{wording} {country}"))
    heldout: dict[Split, int] = {"test": 0, "validation": 1, "calibration": 2}
    return ranked[heldout[split]] if split in heldout else rng.choice(ranked[3:])


def _facts(split: Split, rng: Random) -> QuestionAnswer:
    country, capital, continent = rng.choice(COUNTRIES)
    kind, answer = rng.choice((("capital", capital), ("country", country), ("continent", continent)))
    wording = fact_wording(kind, country, split, rng)
    return QuestionAnswer("facts", wording.format(country=country, capital=capital), answer)


def text_question(task: str, split: Split, rng: Random) -> QuestionAnswer:
    """A question of this task without an image, taken from the items that belong to the split.

    For arithmetic, sorting and comparing the *items* of the splits are disjoint (pairs of operands in either order,
    sets of letters, pairs of numbers): a test question asks for something never seen. For facts, the combinations of
    fact and wording are: a test question asks for a fact that training taught in three other wordings.
    """
    if task == "facts":
        return _facts(split, rng)
    make = {"arithmetic": _arithmetic, "sorting": _sorting, "comparing": _comparing}[task]
    while True:
        key, asked = make(rng)
        if split_of(key) == split:
            return asked
