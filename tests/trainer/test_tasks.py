"""Every kind of sample does what its instruction says, and knows it."""

import re
from collections import Counter

import numpy as np
import pytest

from mige_rt.instruction import count_placeholders
from trainer.stages.features import MAX_IMAGES
from trainer.synthetic.atmosphere import apply
from trainer.synthetic.backgrounds import COLOURS
from trainer.synthetic.concepts import Concept
from trainer.synthetic.edits import FACTORS, STYLE_WORDS
from trainer.synthetic.sample import CONTRAST, MOSTLY, SEEN
from trainer.synthetic.scene import HALF, LARGE, PLACES, REFERENCE_SIZES, SMALL
from trainer.synthetic.tasks import KINDS, SHARES, Mark, Sample, make_sample
from trainer.synthetic.wording import TOWARDS

MANY = 40  # samples looked at by the tests that go over many


def _some(concepts: list[Concept], kind: str, number: int = MANY) -> list[Sample]:
    return [make_sample(3, index, concepts, 64, {kind: 1}) for index in range(number)]


def _edits(concepts: list[Concept], kind: str) -> list[tuple[Sample, np.ndarray]]:
    """Samples of one kind with their sources."""
    return [(sample, sample.source) for sample in _some(concepts, kind) if sample.source is not None]


def _centre(mark: Mark) -> np.ndarray:
    """x, y of the visible box's middle, as fractions of the side."""
    assert mark.box is not None
    left, top, right, bottom = mark.box
    return np.array([left + right, top + bottom]) / 2 / len(mark.mask)


def _same(a: Mark, b: Mark) -> bool:
    return a.concept == b.concept and a.style == b.style and np.array_equal(a.mask, b.mask)


def test_a_sample_depends_on_its_seed_and_index_alone(concepts: list[Concept]) -> None:
    make_sample(7, 3, concepts, 64)
    for index in range(12):
        first, again, other = (make_sample(7, i, concepts, 64) for i in (index, index, index + 1))
        assert first.prompt == again.prompt and np.array_equal(first.target, again.target)
        assert all(np.array_equal(a, b) for a, b in zip(first.images, again.images, strict=True))
        assert first.prompt != other.prompt or not np.array_equal(first.target, other.target)


def test_kinds_come_as_often_as_asked(concepts: list[Concept]) -> None:
    assert set(SHARES) == set(KINDS) and sum(SHARES.values()) == pytest.approx(1)
    number = 600
    counts = Counter(make_sample(1, index, concepts, 16).kind for index in range(number))
    assert all(abs(counts[kind] / number - share) < 0.05 and counts[kind] for kind, share in SHARES.items())
    two = Counter(make_sample(1, index, concepts, 16, {"add": 3, "light": 1}).kind for index in range(number))
    assert set(two) == {"add", "light"} and two["add"] / number == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_whole(concepts: list[Concept], kind: str) -> None:
    for sample in _some(concepts, kind):
        assert sample.kind == kind and count_placeholders(sample.prompt) == len(sample.images) <= MAX_IMAGES
        for image in (*sample.images, sample.target):
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert (sample.task == "subject") == (sample.source is None)
        assert sample.source is None or sum(image is sample.source for image in sample.images) == 1
        references = [mark.reference for mark in sample.after if mark.reference is not None]
        sources = [i for i, image in enumerate(sample.images) if image is sample.source]
        assert sorted([*references, *sources]) == list(range(len(sample.images)))
        assert all(sample.after[i].reference is not None for i in sample.asked) or sample.task == "edit"
        for mark in (*sample.before, *sample.after):
            assert mark.box is not None
            left, top, right, bottom = mark.box
            inside = mark.mask[top:bottom, left:right]
            assert inside.sum() == mark.mask.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        for marks in (sample.before, sample.after):
            assert sum((mark.mask.astype(int) for mark in marks), np.zeros((64, 64), int)).max(initial=0) <= 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "generate"])
def test_an_edit_changes_what_can_be_seen_and_keeps_the_rest(concepts: list[Concept], kind: str) -> None:
    for sample, source in _edits(concepts, kind):
        assert np.array_equal(sample.target[~sample.changed], source[~sample.changed])
        difference = np.abs(sample.target.astype(int) - source).max(axis=-1)
        assert np.array_equal(difference > 0, sample.changed)
        assert (difference >= CONTRAST).mean() >= SEEN


@pytest.mark.parametrize("kind", ["add", "remove", "replace", "recolour_subject", "move", "resize", "restyle"])
def test_an_edit_of_subjects_changes_nothing_but_them(concepts: list[Concept], kind: str) -> None:
    for sample in _some(concepts, kind):
        others = [mark for i, mark in enumerate(sample.after) if i not in sample.asked]
        touched = np.zeros((64, 64), bool)
        for mark in (*sample.before, *(sample.after[i] for i in sample.asked)):
            if not any(_same(mark, other) for other in others):
                touched |= mark.mask
        # Soft edges, and shadows that no mask holds.
        assert (sample.changed & touched).sum() > 0.6 * sample.changed.sum()


def test_recolouring_a_background_leaves_the_subjects(concepts: list[Concept]) -> None:
    for sample, _ in _edits(concepts, "recolour"):
        assert any(colour in sample.prompt.split() for colour in COLOURS)
        assert sample.changed.mean() > 0.4 and sample.asked == ()
        assert all(_same(a, b) for a, b in zip(sample.before, sample.after, strict=True))


def test_removing_takes_one_away(concepts: list[Concept]) -> None:
    for sample in _some(concepts, "remove"):
        left = [mark.concept for mark in sample.after]
        (gone,) = [mark for mark in sample.before if mark.concept not in left]
        assert len(sample.after) == len(sample.before) - 1 and sample.asked == ()
        assert sample.changed[gone.mask].mean() > 0.9


def test_adding_brings_in_what_the_pictures_show(concepts: list[Concept]) -> None:
    numbers = Counter()
    for sample in _some(concepts, "add"):
        present = [mark.concept for mark in sample.before]
        assert [i for i, mark in enumerate(sample.after) if mark.concept not in present] == list(sample.asked)
        numbers[len(sample.asked)] += 1
    assert numbers[1] > numbers[2] > 0


def test_the_place_named_is_the_place_painted(concepts: list[Concept]) -> None:
    found = 0
    for kind, words in (("add", {p: p for p in PLACES}), ("move", {t: p for p, t in TOWARDS.items()})):
        for sample in _some(concepts, kind, 2 * MANY):
            asked = re.sub(
                r"(the|than the) (\w+ )?(thing|object) (in|at|on) the (top|bottom|left|right|middle)( left| right)?",
                "",
                sample.prompt,
            )
            named = [place for place in sorted(words, key=len, reverse=True) if place in asked]
            if len(sample.asked) == 1 and named:
                found += 1
                assert np.abs(_centre(sample.after[sample.asked[0]]) - PLACES[words[named[0]]]).max() < 0.12, (
                    sample.prompt
                )
    assert found > MANY


def test_relations_and_steps_are_where_they_say(concepts: list[Concept]) -> None:
    ways = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    seen = set()
    for sample in _some(concepts, "add", 5 * MANY):
        for words, (axis, sign) in ways.items():
            if f" {words} " in sample.prompt and len(sample.asked) == 1:
                seen.add(words)
                new = _centre(sample.after[sample.asked[0]])
                assert any(
                    sign * (new - _centre(other))[axis] > 0.3 and abs(new - _centre(other))[1 - axis] < 0.2
                    for other in sample.before
                ), sample.prompt
    assert seen == set(ways)
    steps = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    for sample in _some(concepts, "move", 3 * MANY):
        (index,) = sample.asked
        way = _centre(sample.after[index]) - _centre(sample.before[index])
        last = re.sub(r"( in| of)?<imagehere>", "", sample.prompt).split()
        if last[-1] in steps and last[-2] not in ("top", "bottom", "the"):
            axis, sign = steps[last[-1]]
            assert 0.1 < sign * way[axis] < 0.4 and abs(way[1 - axis]) < 0.15, sample.prompt


def test_sizes_are_as_asked(concepts: list[Concept]) -> None:
    for sample in _some(concepts, "resize"):
        (index,) = sample.asked
        before, after = (np.sqrt(marks[index].mask.sum()) for marks in (sample.before, sample.after))
        factor = next((f for word, f in FACTORS.items() if f" {word}" in sample.prompt), None)
        factor = factor or (1.5 if re.search("enlarge|increase", sample.prompt) else 1 / 1.5)
        if min(sample.before[index].mask.sum(), sample.after[index].mask.sum()) > 60:
            assert after / before == pytest.approx(factor, rel=0.25), sample.prompt
    for sample in _some(concepts, "add", 3 * MANY):
        sizes = {"small ": SMALL, "little ": SMALL, "large ": LARGE, "big ": LARGE}
        if len(sample.asked) == 1 and " as " not in sample.prompt and " than " not in sample.prompt:
            sizes[""] = HALF
        for word, part in sizes.items():
            if f"add a {word}<imagehere>" in sample.prompt or f"put a {word}<imagehere>" in sample.prompt:
                box = sample.after[sample.asked[0]].box
                assert box is not None
                longest = max(box[2] - box[0], box[3] - box[1]) / 64
                assert part * REFERENCE_SIZES[0] - 0.08 < longest < part * REFERENCE_SIZES[-1] + 0.04


def test_replacing_keeps_the_place(concepts: list[Concept]) -> None:
    shifts = []
    for sample in _some(concepts, "replace"):
        (index,) = sample.asked
        old, new = sample.before[index], sample.after[index]
        assert old.concept != new.concept and len(sample.before) == len(sample.after)
        shifts.append(np.abs(_centre(old) - _centre(new)).max())
    assert max(shifts) < 0.15 and np.median(shifts) < 0.012  # more only where something hides a part


def test_a_subject_takes_the_colour_that_is_named(concepts: list[Concept]) -> None:
    for sample in _some(concepts, "recolour_subject"):
        (index,) = sample.asked
        mask = sample.after[index].mask
        assert np.array_equal(mask, sample.before[index].mask)
        words = sample.prompt.replace("<imagehere>", " ").split()
        colour = next(word for word in reversed(words) if word in COLOURS)
        # Its mean colour, less its grey, points where the named one does.
        mean, named = (np.array(c, float) - np.mean(c) for c in (sample.target[mask].mean(axis=0), COLOURS[colour]))
        assert mean @ named > 0.9 * np.linalg.norm(mean) * np.linalg.norm(named), sample.prompt


def test_restyling_changes_the_style_alone(concepts: list[Concept]) -> None:
    whole = set()
    for sample in _some(concepts, "restyle"):
        style = sample.after[sample.asked[0]].style
        assert STYLE_WORDS[style][0] in sample.prompt.replace("<imagehere>", " ").split()
        for i, (before, after) in enumerate(zip(sample.before, sample.after, strict=True)):
            assert before.concept == after.concept and (before.style != after.style) == (i in sample.asked)
        whole.add(len(sample.asked))
    assert whole == {1, 2}


@pytest.mark.parametrize("kind", ["light", "weather"])
def test_light_and_weather_are_one_change_of_the_whole_picture(concepts: list[Concept], kind: str) -> None:
    words = {
        "light": ["black and white", "brighter", "darker", "warmer", "colder", "night", "dusk", "dawn", "sunset"],
        "weather": ["heavy rain", "heavy snow", "thick fog", "rain", "snow", "fog"],
    }
    back = 0
    for sample, source in _edits(concepts, kind):
        named = [word for word in words[kind] if word in sample.prompt]
        forward = [word for word in named if np.array_equal(apply(source, word), sample.target)]
        undone = [word for word in words[kind] if np.array_equal(apply(sample.target, word), source)]
        assert forward or undone, sample.prompt
        back += bool(undone) and not forward
        assert sample.asked == () and all(_same(a, b) for a, b in zip(sample.before, sample.after, strict=True))
    assert 0 < back < MANY / 2


def test_generation_shows_one_to_three_subjects(concepts: list[Concept]) -> None:
    numbers = Counter(len(sample.asked) for sample in _some(concepts, "generate"))
    assert numbers[1] > numbers[2] > numbers[3] > 0


def test_subjects_may_hide_a_little_of_each_other(concepts: list[Concept]) -> None:
    """Behind what is removed there is sometimes a thing, which shows whole once it is gone."""
    uncovered = 0
    for sample in _some(concepts, "remove", 4 * MANY):
        before = {mark.concept: mark.mask.sum() for mark in sample.before}
        for mark in sample.after:
            assert before[mark.concept] >= MOSTLY * mark.mask.sum()
            uncovered += before[mark.concept] < mark.mask.sum()
    assert 0 < uncovered < 2 * MANY


def _names(prompt: str, concept: Concept) -> bool:
    return re.search(rf"\b{re.escape(concept.name)}\b", prompt) is not None


def test_held_out_concepts_are_never_named(concepts: list[Concept]) -> None:
    held_out = [concept for concept in concepts if concept.held_out]
    named = Counter()
    for index in range(400):
        for chosen in (held_out, concepts):
            prompt = make_sample(5, index, chosen, 32).prompt
            assert not any(_names(prompt, concept) for concept in held_out), prompt
            named.update(c.name for c in concepts if _names(prompt, c))
    assert set(named) == {concept.name for concept in concepts if not concept.held_out}
