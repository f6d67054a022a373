"""Parse a model's response into a command: the projection of the published ALFWorld and WebShop runs.

The text is compared and cut, never evaluated.
"""

from collections.abc import Sequence

ALFWORLD_TAIL, WEBSHOP_TAIL = 30, 20
TAGS = ("<think>", "</think>", "<action>", "</action>")


def project(response: str, tail: int = ALFWORLD_TAIL) -> tuple[str, bool]:
    """Extract the command from a response, by the rules of the official code's projections.

    Args:
        response: the model's text, with the beginning that the prompt gave for it.
        tail: characters of the fallback command.

    Returns:
        (command, valid): the lower-cased text of the first action tag, or the last `tail` characters without one. A
        valid response has both action tags (any case), both think tags (lower case) and no CJK ideograph; whether the
        environment admits the command is checked elsewhere.
    """
    text = response.lower()
    start, end = text.find("<action>"), text.find("</action>")
    if start < 0 or end < 0:
        return text[-tail:], False
    command = text[start + len("<action>") : end].strip()
    thought = "<think>" in response and "</think>" in response
    return command, thought and not any("\u4e00" <= c <= "\u9fff" for c in response)


def spelled(command: str, admissible: Sequence[str]) -> str:
    """Restore the white space of a command from a policy whose tokens do not encode it.

    Returns:
        The admissible command that differs only in white space; a search with single spaces; else the command itself.
    """
    squeezed = "".join(command.split())
    for known in admissible:
        if "".join(known.split()) == squeezed:
            return known
    if squeezed.startswith("search[") and squeezed.endswith("]"):
        return f"search[{' '.join(command.partition('[')[2].rpartition(']')[0].split())}]"
    return command
