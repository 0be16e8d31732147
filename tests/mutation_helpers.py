"""Changes to the bytes of a file, and to what JSON holds, as damage or an enemy would make them."""

import json
import random
from typing import Any

NUMBERS = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80")
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "\x1b[2J\n", "../../x"),
    *("/etc/passwd", [], {}, [[]], [1e308], {"a": {}}, "9" * 5000, [None] * 3),
)


def mutant(draw: random.Random, content: bytes) -> bytes:
    """Returns the bytes with one to three changes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.choice(("flip", "overwrite", "insert", "remove", "cut", "move", "repeat"))
        at = draw.randrange(len(changed) + 1)
        length = min(draw.choice((1, 2, 4, 16, 200)), len(changed) - at)
        if kind == "flip" and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "overwrite":
            number = draw.choice(NUMBERS)
            changed[at : at + len(number)] = number
        elif kind == "insert":
            changed[at:at] = draw.randbytes(draw.choice((1, 4, 50)))
        elif kind == "remove":
            del changed[at : at + length]
        elif kind == "cut":
            del changed[at:]
        elif kind == "move":
            part = changed[at : at + length]
            del changed[at : at + length]
            place = draw.randrange(len(changed) + 1)
            changed[place:place] = part
        else:
            changed[at:at] = changed[at : at + length] * draw.choice((1, 3))
    return bytes(changed)


def json_mutant(draw: random.Random, content: bytes) -> bytes:
    """Returns JSON with one value replaced, removed or put under another name; or `mutant`."""
    if draw.random() < 0.4:
        return mutant(draw, content)
    tree = json.loads(content)
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            node = inner
            continue
        break
    kind = draw.choice(("replace", "replace", "remove", "rename"))
    if kind == "replace":
        node[key] = draw.choice(HOSTILE)
    elif kind == "remove" or isinstance(node, list):
        del node[key]
    else:
        node[f"{key}?"] = node.pop(key)
    if draw.random() < 0.03:
        return b"[" * 100_000
    return json.dumps(tree).encode()
