"""A small world in words: stories, questions, facts, counting, greetings. All chance is the given generator's."""

from __future__ import annotations

import random
from collections.abc import Callable

Chat = tuple[tuple[str, str], ...]
"""(role, content) pairs; the last one is the assistant's."""

PEOPLE = {
    "Anna": "she", "Ben": "he", "Clara": "she", "David": "he", "Emma": "she", "Felix": "he", "Greta": "she",
    "Hugo": "he", "Ida": "she", "Jonas": "he", "Lena": "she", "Max": "he", "Nora": "she", "Oscar": "he", "Paula": "she",
    "Simon": "he",
}  # fmt: skip
JOBS = {
    "baker": "bread", "farmer": "apples", "fisher": "fish", "painter": "pictures", "gardener": "flowers",
    "tailor": "coats", "carpenter": "chairs", "beekeeper": "honey",
}  # fmt: skip
PLACES = (
    "by the river", "near the forest", "on the hill", "at the harbour", "next to the mill", "behind the old church",
    "above the market", "beside the lake",
)  # fmt: skip
GOALS = ("the market", "the forest", "the lake", "the harbour", "the mill", "the garden", "the bridge", "the village")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "brown")
THINGS = ("key", "lamp", "boat", "basket", "hat", "book", "bell", "drum", "kite", "coin")
WEATHER = (
    "The sun is warm.",
    "A light rain falls.",
    "The wind is cold.",
    "Snow lies on the roofs.",
    "The sky is clear.",
)
TIMES = (
    "One morning",
    "In the evening",
    "On Sunday",
    "After lunch",
    "Early in spring",
    "Late at night",
    "The next day",
)
FEELINGS = ("happy", "tired", "hungry", "curious", "quiet", "proud")
ANIMALS = {
    "cat": ("milk", "in the house"), "dog": ("meat", "in the yard"), "cow": ("grass", "in the barn"),
    "fox": ("mice", "in the forest"), "owl": ("mice", "in the old tree"), "horse": ("hay", "in the barn"),
    "duck": ("bread", "on the lake"), "rabbit": ("carrots", "in the field"), "bear": ("honey", "in the forest"),
    "goat": ("leaves", "on the hill"),
}  # fmt: skip


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def story(rng: random.Random, sentences: int, hero: str | None = None) -> str:
    """A chain of events that keeps its hero, friend, animal and thing."""
    hero = hero or rng.choice(list(PEOPLE))
    friend = rng.choice([name for name in PEOPLE if name != hero])
    they, job, animal = PEOPLE[hero], rng.choice(list(JOBS)), rng.choice(list(ANIMALS))
    They, thing = they.capitalize(), f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    food, home = ANIMALS[animal]
    lines = [f"{hero} is a {job} and lives {rng.choice(PLACES)}.", f"{They} has {a(animal)} that lives {home}."]
    events: tuple[Callable[[], str], ...] = (
        lambda: f"{rng.choice(TIMES)} {they} goes to {rng.choice(GOALS)}.",
        lambda: rng.choice(WEATHER),
        lambda: f"There {they} meets {friend}, who is {rng.choice(FEELINGS)} today.",
        lambda: f"{friend} asks for {JOBS[job]} and {hero} gives {rng.randint(2, 9)} of the best.",
        lambda: f"{hero} finds a {thing} near {rng.choice(GOALS)}.",
        lambda: f"{They} shows the {thing} to {friend}.",
        lambda: f"The {animal} wants {food} and {hero} laughs.",
        lambda: f"Then {hero} and {friend} walk to {rng.choice(GOALS)} together.",
        lambda: f"{They} is {rng.choice(FEELINGS)} and sings a song about {rng.choice(GOALS)}.",
        lambda: f"{friend} says that the {animal} is {rng.choice(FEELINGS)}.",
    )
    previous = None
    while len(lines) < sentences - 1:
        event = rng.choice([event for event in events if event is not previous])
        previous = event
        lines.append(event())
    lines.append(f"At last {they} goes home and the {animal} is {rng.choice(FEELINGS)}.")
    return " ".join(lines)


def telling(rng: random.Random) -> Chat:
    hero = rng.choice(list(PEOPLE))
    if rng.random() < 0.15:
        return (("user", f"Tell me a long story about {hero}."), ("assistant", story(rng, rng.randint(14, 22), hero)))
    return (("user", f"Tell me a story about {hero}."), ("assistant", story(rng, rng.randint(4, 8), hero)))


def reading(rng: random.Random) -> Chat:
    """A question whose answer stands in the message."""
    hero, other = rng.sample(list(PEOPLE), 2)
    place, elsewhere = rng.sample(PLACES, 2)
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    question, answer = rng.choice((
        (f"Where does {hero} live?", f"{hero} lives {place}."),
        (f"Where does {other} live?", f"{other} lives {elsewhere}."),
        (f"What does {hero} have?", f"{hero} has a {colour} {thing}."),
        (f"What colour is the {thing}?", f"The {thing} is {colour}."),
    ))  # fmt: skip
    facts = [f"{hero} lives {place}.", f"{other} lives {elsewhere}.", f"{hero} has a {colour} {thing}."]
    rng.shuffle(facts)
    return (("user", f"{' '.join(facts)} {question}"), ("assistant", answer))


def fact(rng: random.Random) -> Chat:
    animal = rng.choice(list(ANIMALS))
    food, home = ANIMALS[animal]
    job = rng.choice(list(JOBS))
    return rng.choice((
        (("user", f"What does {a(animal)} eat?"), ("assistant", f"{a(animal).capitalize()} eats {food}.")),
        (("user", f"Where does {a(animal)} live?"), ("assistant", f"{a(animal).capitalize()} lives {home}.")),
        (("user", f"What does a {job} sell?"), ("assistant", f"A {job} sells {JOBS[job]}.")),
    ))  # fmt: skip


def counting(rng: random.Random) -> Chat:
    start = rng.randint(1, 90)
    if rng.random() < 0.5:
        return (("user", f"What comes after {start}?"), ("assistant", f"After {start} comes {start + 1}."))
    end = start + rng.randint(2, 9)
    numbers = ", ".join(map(str, range(start, end + 1)))
    return (("user", f"Count from {start} to {end}."), ("assistant", f"{numbers}."))


GREETINGS = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Hi!", "Hi! Shall I tell you a story?"),
    ("Good morning!", "Good morning! The sun is warm today."),
    ("How are you?", "I am well, thank you. And you?"),
    ("Who are you?", "I am a small model. I tell stories, I count, and I work with letters when you say how."),
    ("What can you do?", "I can tell a story, answer small questions, count, and sort or reverse letters."),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Come back soon."),
)


def greeting(rng: random.Random) -> Chat:
    question, answer = rng.choice(GREETINGS)
    return (("user", question), ("assistant", answer))


def conversation(rng: random.Random) -> Chat:
    """One chat of the world, of any kind."""
    kinds = (telling, reading, fact, counting, greeting)
    return rng.choices(kinds, weights=(4, 4, 2, 3, 1))[0](rng)
