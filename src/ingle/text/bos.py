"""Whether a conversation's prompt begins as the model's texts do: with BOS, and with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingle.errors import RequestError, printable

if TYPE_CHECKING:
    from ingle.text.chat_template import ChatTemplate
    from ingle.text.tokenizer import Tokenizer

_HELLO = ({"role": "user", "content": "Hello"},)


def text_bos(tokenizer: Tokenizer) -> int | None:
    """The token that the tokenizer puts before every plain text, if it does."""
    plain, whole = (tokenizer.encode("Hello", add_special_tokens=added) for added in (False, True))
    return whole[0] if whole and whole[1 : 1 + len(plain)] == plain else None


def bos_notice(tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """What to tell the user where the template writes no BOS and the tokenizer would, or where it writes two.

    The prompt of a conversation is the template's alone: nothing is added to it or taken from it.
    """
    before_text = text_bos(tokenizer)
    bos = tokenizer.bos_token_id if before_text is None else before_text
    if bos is None:
        return None
    try:
        prompt = template.prompt(_HELLO)
        ids = tokenizer.encode(prompt, add_special_tokens=False)
    except RequestError:  # such as that of a template that wants more than a question
        return None
    token = printable(tokenizer.token(bos))
    if ids[:2] == [bos, bos]:
        return f"the chat template writes {token} twice at the beginning of a prompt (`ingle render` shows it)"
    if before_text is not None and ids[:1] != [bos]:
        return (
            f"the chat template begins a prompt without {token}, which the tokenizer puts before every text: if "
            "answers are poor, give another --chat-template (`ingle render` shows the prompt)"
        )
    return None
