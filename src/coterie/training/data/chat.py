"""Conversations and instructions: read from rows, written by a chat template, only the answers trained.

A conversation is one record. What the assistant says is predicted; the rest is read and has no label. A template
decides how turns are written, so an answer's characters are found by writing the conversation up to each turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from jinja2 import TemplateError

from coterie.errors import DataError
from coterie.training.data.readers import IntegerText, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
}
"""Columns of each ``data.form``."""
OPTIONAL = ("input",)

Message = Mapping[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class Conversation:
    """Turns of one record.

    Attributes:
        messages: in their order.
        joined: a prompt and its completion, which can be written one after the other without a template.
    """

    messages: tuple[Message, ...]
    joined: bool = False

    @property
    def blank(self) -> bool:
        return not any(message["content"].strip() for message in self.messages)

    def text(self) -> str:
        """One string that stands for the conversation, whatever template writes it: what the ledger knows it by."""
        return json.dumps([dict(message) for message in self.messages], ensure_ascii=False)


def conversation(form: str, values: Sequence[Any], where: str) -> Conversation:
    """A row's conversation.

    Args:
        form: of `COLUMNS`.
        values: of its columns, in their order; None for an absent optional one.
        where: file and row, for errors.

    Raises:
        DataError: ``data-not-chat``: not what the form asks for; no value is repeated.
    """
    if form == "messages":
        return Conversation(_answered(_messages(values[0], where), where))
    if form == "prompt_completion":
        prompt, completion = values
        if _is_text(prompt) and _is_text(completion):
            return Conversation((_message("user", prompt), _message("assistant", completion)), joined=True)
        return Conversation(_answered((*_messages(prompt, where), *_messages(completion, where)), where))
    instruction, given, output = values
    for column, value in zip(COLUMNS[form], values, strict=True):
        if not _is_text(value) and not (value is None and column in OPTIONAL):
            raise _unfit(where, f"`{column}` is {kind_of(value)}, not text")
    asked = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    return Conversation((_message("user", asked), _message("assistant", output)))


def encoded(
    talk: Conversation, tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are an answer's.

    Args:
        talk: the conversation.
        tokenizer: a fast one; its chat template writes the turns.
        template: in place of the tokenizer's.

    Raises:
        DataError: there is no template, or it refuses the turns or writes answers where they cannot be found.
    """
    template = _own_template(tokenizer) if template is None else template
    if template is None:
        if not talk.joined:
            raise DataError(
                "The tokenizer has no chat template.",
                code="data-no-template",
                where="data.form",
                why="how turns are written decides what the model learns to answer to",
                fix="name one with data.template (a Jinja file), use a tokenizer of a chat model, or rows with "
                "`prompt` and `completion` as text",
            )
        prompt, completion = (message["content"] for message in talk.messages)
        text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
    else:
        text, spans = _written(talk.messages, tokenizer, template)
    found = tokenizer(text, add_special_tokens=template is None, return_offsets_mapping=True, verbose=False)
    places = found["offset_mapping"]  # a token that holds a character of an answer is the answer's
    trained = [any(start < last and end > first for first, last in spans) for start, end in places]
    ids: list[int] = found["input_ids"]
    if template is None and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    return ids, trained


def read_template(path: Path | None) -> str | None:
    """A chat template from a file.

    Raises:
        DataError: it cannot be read.
    """
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}"
    else:
        if text.strip():
            return text
        problem = "is empty"
    raise DataError(
        f"The chat template {path} {problem}.",
        code="data-template",
        fix="set data.template to a Jinja file, as a model's chat_template.jinja is",
    )


def as_turn(prompt: str, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """A prompt as a user's turn, up to where the answer begins.

    Args:
        prompt: what the user says.
        tokenizer: its chat template writes the turn.
        template: in place of the tokenizer's.

    Raises:
        DataError: there is no template, or it refuses the turn.
    """
    template = _own_template(tokenizer) if template is None else template
    if template is None:
        raise DataError(
            "The model's tokenizer has no chat template.",
            code="data-no-template",
            why="how turns are written decides what a model answers to",
            fix="name one with --template FILE (Jinja), or leave out --chat: the prompt is then continued as text",
        )
    return _by_template([{"role": "user", "content": prompt}], tokenizer, template, asks=True)


def answer_end(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int | None:
    """The special token that a template writes behind an answer, often another than the one that ends a text.

    Args:
        tokenizer: its chat template writes the turns.
        template: in place of the tokenizer's.

    Returns:
        None where the template writes none, or no answer that can be found.
    """
    template = _own_template(tokenizer) if template is None else template
    if template is None:
        return None
    turns = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
    try:
        written = _by_template(turns, tokenizer, template, asks=False)
    except DataError:
        return None
    _, said, behind = written.rpartition("answer")
    if not said:
        return None
    ids: list[int] = tokenizer(behind.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    return ids[0] if ids and ids[0] in special_tokens(tokenizer) else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that stand for no characters of a text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset((*tokenizer.all_special_ids, *(number for number, token in added if token.special)))


def _by_template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, *, asks: bool
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=asks,
            chat_template=template,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _bad_template(f"refuses the turns ({type(error).__name__})") from None
    return text


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _written(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """The text up to the last answer, and where answers are in it, with what ends them.

    A template that writes earlier turns in another way once later ones follow leaves the last answer alone.
    """

    def written(count: int, *, asks: bool = False) -> str:
        return _by_template(messages[:count], tokenizer, template, asks=asks)

    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    whole = written(answers[-1] + 1)
    spans = []
    for number in answers:
        upto = written(number + 1) if number != answers[-1] else whole
        before = (written(number, asks=True), written(number)) if number else ("",)
        starts = [text for text in before if upto.startswith(text)]
        if starts and whole.startswith(upto):
            spans.append((len(starts[0]), len(upto)))
    if not spans or spans[-1][1] != len(whole):
        raise _bad_template("does not write an answer behind what it answers to")
    return whole, spans


def _bad_template(problem: str) -> DataError:
    return DataError(
        f"The chat template {problem}.",
        code="data-template",
        why="which tokens are an answer's could not be known",
        fix="look at the roles and their order, or name another template with data.template",
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _unfit(where, "a list of turns is expected, each with `role` and `content`")
    messages = []
    for item in value:
        given = item if isinstance(item, Mapping) else {}
        role, content = given.get("role"), given.get("content")
        if not _is_text(role) or not _is_text(content):
            raise _unfit(
                where,
                "every turn needs a `role` and a `content`, both text; tool calls and content in parts are not read",
            )
        messages.append(_message(role, content))
    return tuple(messages)


def _answered(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    if not any(message["role"] == "assistant" for message in messages):
        raise _unfit(where, "no turn has the role `assistant`, so nothing would be trained")
    return messages


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and not isinstance(value, IntegerText)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _unfit(where: str, problem: str) -> DataError:
    return DataError(
        f"{where} is no conversation: {problem}.",
        code="data-not-chat",
        fix="mend the row, or set data.form to what the file holds: "
        + "; ".join(f"`{form}` ({', '.join(columns)})" for form, columns in COLUMNS.items()),
    )
