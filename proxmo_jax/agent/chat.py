"""How a language model is spoken to: its chat template, what that begins an answer with, and what ends one."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from envs_bridge.actions import TAGS
from proxmo_jax.errors import UserError

ANSWER = "Nothing-more-to-say"
# What is given to a template in any case, and what decides how it is rendered.
TAKEN = (
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding"
    " truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()


def template_arguments(settings: Sequence[str]) -> dict[str, Any]:
    """{'enable_thinking': False} from ('enable_thinking=false',): true, false, numbers, and text for all else.

    Raises UserError for a setting without a name, or with one that is not the template's to have.
    """
    arguments: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model.chat-template-args: need name=value, got {setting!r}")
        if name in TAKEN:
            raise UserError(f"--model.chat-template-args: {name} is set for every template and cannot be set again")
        arguments[name] = _value(text)
    return arguments


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    plain = isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else text


def settings_of(table: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that `template_arguments` reads, from a TOML table. Raises UserError for lists, tables and dates."""
    for name, value in table.items():
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"--config: chat_template_args.{name} must be true, false, a number or text, got {value!r}")
    return tuple(f"{name}={json.dumps(value)}" for name, value in table.items())


def chat(tokenizer, prompt: str, **arguments: Any) -> str:
    """The prompt as the user's turn, by the tokenizer's own template where it has one."""
    if not tokenizer.chat_template:
        return prompt
    return _render(tokenizer, [("user", prompt)], arguments, ask=True)


def _render(tokenizer, turns: Sequence[tuple[str, str]], arguments: Mapping[str, Any], *, ask: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **arguments)


def answer_start(tokenizer, **arguments: Any) -> str:
    """What the template begins every answer with, from the first tag on: an opened or an empty thought, mostly nothing.

    Raises UserError for a template that cannot be rendered, does not read one of the arguments, or does not begin an
    answer.
    """
    if not tokenizer.chat_template:
        if arguments:
            raise UserError(
                f"--model.chat-template-args: the model has no chat template, which {min(arguments)} could be for"
            )
        return ""
    user = "What now?"
    try:
        template = tokenizer.get_chat_template()
        asked = chat(tokenizer, user, **arguments)
        unasked = _render(tokenizer, [("user", user)], arguments, ask=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"--model: its chat template cannot be rendered ({error})") from error
    for name in arguments:
        if not re.search(rf"\b{name}\b", template):
            raise UserError(f"--model.chat-template-args: the model's chat template does not read {name}")
    if asked == unasked:
        _check_begun(tokenizer, user, asked, arguments)
    added = asked.removeprefix(unasked)
    if added in ("", asked):  # not what is asked for alone
        added = asked.rpartition(user)[2]
    starts = [added.index(tag) for tag in TAGS if tag in added]
    return added[min(starts) :] if starts else ""


def _check_begun(tokenizer, user: str, asked: str, arguments: Mapping[str, Any]) -> None:
    """Raise UserError if a template that has no generation prompt needs one: if it writes something before an answer.

    The user's turn alone may end with what an answer follows, as in the templates of Llama 2 and Mistral.
    """
    text = _with_answer(tokenizer, user, arguments)
    if text is None or not text.startswith(asked):
        return
    before = text[len(asked) :].partition(ANSWER)[0].strip()
    if before:
        raise UserError(
            f"--model: its chat template has no generation prompt, but begins an answer with {before!r}; need one that"
            " reads add_generation_prompt"
        )


def _with_answer(tokenizer, user: str, arguments: Mapping[str, Any]) -> str | None:
    """A user's turn and an assistant's, which says `ANSWER`; None for a template that cannot render one of these."""
    try:
        return _render(tokenizer, [("user", user), ("assistant", ANSWER)], arguments, ask=False)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


def turn_end(tokenizer, **arguments: Any) -> int | None:
    """The token that the template puts after an assistant's turn; None without one, or if that is ordinary text."""
    if not tokenizer.chat_template:
        return None
    text = _with_answer(tokenizer, "What now?", arguments)
    if text is None:
        return None
    _, found, rest = text.rpartition(ANSWER)
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(rest.lstrip(), add_special_tokens=False).ids if found else []
    added = backend.get_added_tokens_decoder()
    return ids[0] if ids and ids[0] in added and added[ids[0]].content not in TAGS else None
