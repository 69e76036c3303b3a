"""Requests to a smart home by intent, said from the English sentence templates of Home Assistant."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from metafit import wheels
from metafit.data.source import Source
from metafit.data.templates import expand

WHEEL = "home-assistant-intents"
UTTERANCES = 60
FEWEST = 20

# What people say where a template leaves the value open. Names are by the kind of device a template is for.
NAMES: dict[str, tuple[str, ...]] = {
    "binary_sensor": (
        "front door",
        "back door",
        "bathroom window",
        "hallway motion sensor",
        "garage door",
        "smoke alarm",
    ),
    "button": ("doorbell", "restart", "coffee", "panic", "reset"),
    "climate": ("thermostat", "heater", "air conditioner", "radiator", "heat pump", "boiler"),
    "cover": (
        "garage door",
        "front gate",
        "bedroom curtains",
        "left blind",
        "patio awning",
        "roller shutter",
        "skylight",
    ),
    "fan": ("ceiling fan", "bathroom fan", "tower fan", "extractor fan", "desk fan"),
    "input_boolean": ("guest mode", "vacation mode", "night mode"),
    "lawn_mower": ("lawn robot", "Shaun", "front yard robot", "grass cutter", "Moe"),
    "light": (
        "bedside lamp",
        "reading light",
        "ceiling light",
        "porch light",
        "floor lamp",
        "chandelier",
        "night light",
    ),
    "lock": ("front door", "back door", "garage", "side gate", "shed", "cellar door"),
    "media_player": ("TV", "living room speaker", "radio", "kitchen speaker", "soundbar", "projector", "stereo"),
    "person": ("Anna", "Tom", "Grandma", "Emily", "Carlos", "Sofia", "Dad"),
    "scene": ("movie night", "romantic", "good morning", "party time", "bedtime", "dinner"),
    "script": ("wake up", "leaving home", "water the plants", "goodnight routine"),
    "sensor": ("outdoor humidity", "washing machine", "solar power", "car battery", "water pressure", "air quality"),
    "switch": ("coffee maker", "kettle", "Christmas tree", "dehumidifier", "pool pump", "outlet", "toaster"),
    "todo": ("to-do", "packing", "chores", "work", "birthday", "reading", "school", "holiday"),
    "vacuum": ("robot vacuum", "vacuum cleaner", "Rosie", "hoover", "Roomba", "downstairs vacuum"),
    "valve": ("water valve", "sprinkler", "gas valve", "garden hose", "irrigation"),
    "weather": ("Boston", "Amsterdam", "London", "Tokyo", "Seattle", "Paris", "Madrid", "Chicago"),
}
VALUES: dict[str, tuple[str, ...]] = {
    "area": ("kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "dining room", "basement")
    + ("kids room", "guest room", "laundry room", "patio", "garden", "attic", "study"),
    "floor": ("first", "second", "ground", "top", "upper", "lower", "third"),
    "message": ("dinner is ready", "it is time for bed", "the taxi is here", "we are leaving in ten minutes")
    + ("someone is at the door", "breakfast is on the table", "I am on my way home", "the movie is about to start")
    + ("please come downstairs", "lunch will be late", "the laundry is done", "time to walk the dog")
    + ("your bath is ready", "grandma has arrived", "the football game is on", "do your homework")
    + ("the pizza is here", "I need help in the garage", "the bus comes in five minutes", "good night everyone"),
    "search_query": ("the Beatles", "Bohemian Rhapsody", "some jazz", "Taylor Swift", "Abbey Road", "Beethoven's fifth")
    + (
        "relaxing piano",
        "the Lion King",
        "classic rock",
        "The Daily",
        "workout hits",
        "Miles Davis",
        "Hotel California",
    )
    + ("Stranger Things", "lo-fi beats", "Adele", "Dark Side of the Moon", "Christmas songs", "Star Wars"),
    "shopping_list_item": (
        "milk",
        "eggs",
        "bread",
        "butter",
        "tomatoes",
        "toilet paper",
        "coffee",
        "apples",
        "rice",
        "cheese",
    )
    + ("olive oil", "dog food", "chicken breast", "orange juice", "pasta", "onions", "bananas", "dish soap", "yogurt"),
    "timer_command": ("turn off the lights", "open the garage door", "start the vacuum", "close the blinds")
    + ("turn on the heating", "lock the front door", "pause the music", "turn off the oven", "play some music"),
    "timer_name": ("pizza", "laundry", "egg", "tea", "pasta", "workout", "homework", "bread", "cookie", "nap", "rice"),
    "todo_list_item": (
        "call the dentist",
        "water the plants",
        "pay the rent",
        "clean the windows",
        "buy a gift",
        "passport",
    )
    + ("sunscreen", "send the invitation", "fix the bike", "return the books", "mow the lawn", "book the flights")
    + ("charge the camera", "wash the car", "finish the report", "take out the trash", "renew the insurance"),
    "zone": ("home", "work", "school", "gym", "office", "supermarket"),
    "color_temperature": tuple(str(kelvin) for kelvin in range(2200, 6600, 400)),
    "temperature": tuple(str(degrees) for degrees in (*range(17, 26), *range(64, 76, 2))),
    "timer_hours": ("1", "2", "3", "4", "5", "6", "8", "12"),
    "timer_minutes": ("1", "2", "3", "5", "8", "10", "12", "15", "20", "25", "30", "40", "45", "50"),
    "timer_seconds": ("5", "10", "15", "20", "30", "40", "45", "90"),
}
PERCENT = tuple(str(percent) for percent in (*range(10, 101, 10), 15, 25, 35, 75))

# Number, article and noun of a template vary on their own; "add 5 minute" and "the London" are nobody's English.
_UNGRAMMATICAL = re.compile(
    r"\b1[ -](hour|minute|second)s\b|\d-(hour|minute|second)s\b|(hour|minute|second)s timer\b"
    r"|\b(?!1\b)\d+[ -](hour|minute|second)\b(?! timer)|\b(half|1/2) a (hour|minute|second)s\b"
    r"|\d and (a )?(half|1/2) (hour|minute|second)\b|\ban (?!8|11|18)\d|\ba (8|11|18)\b|\d degree\b"
    r"|\b(the|my|our) (the|my|our|any|all|every|each|on|off|in|open|shut|closed|locked|unlocked)\b"
    r"|\b(every|each|single|there) (the|my|our)\b|\blight (light|lamp)|\b(?P<word>\w+) (?P=word)\b|^are (?!.*\w{3}s\b)"
)
_PROPER = "|".join((*NAMES["person"], *NAMES["weather"], "Shaun", "Moe", "Rosie"))
_ARTICLE_BEFORE_NAME = re.compile(rf"\b(the|my|our) (?=({_PROPER})\b)")


def load(seed: int = 0) -> Source:
    """Up to 60 distinct utterances for each intent that has 20 or more; the same ones for the same seed."""
    grammar = json.loads(wheels.member(WHEEL, "home_assistant_intents/data/en.json"))
    said = {intent: _utterances(intent, body["data"], grammar, seed) for intent, body in grammar["intents"].items()}
    shared = Counter(_spoken(text) for texts in said.values() for text in texts)
    clear = {intent: [text for text in texts if shared[_spoken(text)] == 1] for intent, texts in said.items()}
    kept = sorted((_class_name(intent), texts) for intent, texts in clear.items() if len(texts) >= FEWEST)
    return Source(
        "home-intents",
        [text for _, texts in kept for text in texts],
        torch.tensor([index for index, (_, texts) in enumerate(kept) for _ in texts], dtype=torch.int64),
        tuple(name for name, _ in kept),
        "text",
    )


def _utterances(intent: str, blocks: list[dict[str, Any]], grammar: Mapping[str, Any], seed: int) -> list[str]:
    """Draws a combination of slots, then a template of it, then a sentence, until there are enough."""
    rng = random.Random(f"{seed}:{intent}")
    found: dict[str, str] = {}
    for _ in range(UTTERANCES * 40):
        block = rng.choice(blocks)

        def value(name: str, rng: random.Random, block: dict[str, Any] = block) -> str:
            return _value(name, block, grammar["lists"], rng)

        text = expand(rng.choice(block["sentences"]), grammar["expansion_rules"], value, rng)
        text = _ARTICLE_BEFORE_NAME.sub("", text)
        if text and not _UNGRAMMATICAL.search(text):
            found.setdefault(_spoken(text), text)
        if len(found) == UTTERANCES:
            break
    return list(found.values())


def _value(name: str, block: Mapping[str, Any], lists: Mapping[str, Any], rng: random.Random) -> str:
    if name == "name":
        domains = block["requires_context"]["domain"]
        kinds = [kind for kind in ([domains] if isinstance(domains, str) else domains) if kind in NAMES]
        return rng.choice(NAMES[rng.choice(kinds)])
    if name in VALUES:
        return rng.choice(VALUES[name])
    if "values" in lists[name]:
        return str(rng.choice(lists[name]["values"])["in"])
    return rng.choice(PERCENT)


def _spoken(text: str) -> str:
    """The words as a listener hears them: two spellings of one utterance are one utterance."""
    return re.sub(r"[^a-z0-9%° ]", "", text.lower().replace("-", " "))


def _class_name(intent: str) -> str:
    """HassTurnOn becomes turn_on."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", intent.removeprefix("Hass")).lower()
