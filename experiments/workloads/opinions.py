"""Short requests for a sentence of opinion: the prompts of the workloads that train by rewards.

The list is written here, so that no data set is needed. Its last things are held out.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

REQUEST = "Write one short sentence of opinion about {thing}."
_WORDS = """
rain winter summer autumn snow wind fog thunder sunrise sunset mountains rivers lakes deserts forests beaches
islands gardens parks farms cities villages bridges castles museums libraries theatres cinemas hotels
restaurants kitchens offices schools hospitals airports trains buses bicycles boats cars planes elevators roads
maps holidays weddings birthdays parties concerts festivals dancing singing painting drawing writing reading
cooking baking swimming running hiking skiing fishing camping chess football tennis puzzles games movies novels
poems letters newspapers radio television telephones computers robots cameras clocks glasses shoes hats
umbrellas chairs lamps mirrors candles soap coffee tea milk bread cheese butter honey chocolate apples oranges
bananas tomatoes potatoes onions mushrooms soup salad pizza pancakes dogs cats horses birds bees butterflies
spiders whales elephants penguins
"""
THINGS = tuple(_WORDS.split())
"""What the requests are about, in the plural or without an article."""
HELD_OUT = 32
THINGS_IN_ORDER = tuple(sorted(THINGS, key=lambda thing: hashlib.sha256(thing.encode()).hexdigest()))
"""The things in an order that has nothing to do with what they are."""
TRAINING, VALIDATION = THINGS_IN_ORDER[:-HELD_OUT], THINGS_IN_ORDER[-HELD_OUT:]


def requests(things: tuple[str, ...]) -> list[str]:
    """Return the request about each thing."""
    return [REQUEST.format(thing=thing) for thing in things]


def prompts(things: tuple[str, ...], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each request in the tokenizer's chat template, up to where the answer begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the policy's tokenizer has no chat template; use an instruct model's tokenizer")
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in requests(things)
    ]


def fingerprint() -> str:
    """Return the sha256 of all requests, in order."""
    return hashlib.sha256(json.dumps([requests(TRAINING), requests(VALIDATION)]).encode()).hexdigest()
