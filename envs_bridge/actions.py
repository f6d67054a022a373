"""From a model's answer to a command: the projection of the published ALFWorld and WebShop runs.

The text is only ever compared and cut, never evaluated.
"""

from collections.abc import Sequence

ALFWORLD_TAIL, WEBSHOP_TAIL = 30, 20
TAGS = ("<think>", "</think>", "<action>", "</action>")


def project(answer: str, tail: int = ALFWORLD_TAIL) -> tuple[str, bool]:
    """(command, valid): the lower-cased text of the first action tag; without one, the last `tail` characters.

    Valid needs both action tags (any case), both think tags as written, and no CJK ideograph. What a prompt has begun
    for the policy is a part of the answer. Admissibility in the world is another question. Source: the official code's
    projections (spec, 'The published recipe').
    """
    text = answer.lower()
    start, end = text.find("<action>"), text.find("</action>")
    if start < 0 or end < 0:
        return text[-tail:], False
    command = text[start + len("<action>") : end].strip()
    thought = "<think>" in answer and "</think>" in answer
    return command, thought and not any("\u4e00" <= c <= "\u9fff" for c in answer)


def spelled(command: str, admissible: Sequence[str]) -> str:
    """The command as the world spells it, from a policy whose tokens do not know where spaces were: the admissible one
    that differs in white space alone, or a search with single spaces; anything else as it is."""
    squeezed = "".join(command.split())
    for known in admissible:
        if "".join(known.split()) == squeezed:
            return known
    if squeezed.startswith("search[") and squeezed.endswith("]"):
        return f"search[{' '.join(command.partition('[')[2].rpartition(']')[0].split())}]"
    return command
