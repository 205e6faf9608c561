"""The tokenizer as `LLM.get_tokenizer()` gives it: what users of vLLM call on transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingle.errors import RequestError
from ingle.text.chat_template import ChatTemplate
from ingle.text.tokenizer import Tokenizer

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "return_tensors": (None,),
    "return_dict": (False, None),
    "padding": (False, None),
    "truncation": (False, None),
}


class UserTokenizer:
    """`encode`, `decode`, `apply_chat_template` and the special tokens, with transformers' names and defaults."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.chat_template = None if template is None else template.source
        self.vocab_size = tokenizer.vocab_size
        self.eos_token, self.bos_token, self.pad_token, self.unk_token = (
            tokenizer.special_tokens.get(f"{name}_token") for name in ("eos", "bos", "pad", "unk")
        )
        self.eos_token_id, self.bos_token_id, self.pad_token_id, self.unk_token_id = (
            None if token is None else tokenizer.token_id(token)
            for token in (self.eos_token, self.bos_token, self.pad_token, self.unk_token)
        )
        self.all_special_ids = sorted(tokenizer.special_token_ids)
        self.all_special_tokens = [tokenizer.token(token_id) for token_id in self.all_special_ids]

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, as lists, for one text or several."""
        _refuse_others("tokenizer()", options)
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        many = [self.encode(one, add_special_tokens) for one in text]
        return {"input_ids": many, "attention_mask": [[1] * len(ids) for ids in many]}

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens as the vocabulary spells them; of one that it lacks that of the unknown token, or None."""
        if isinstance(tokens, str):
            found = self._tokenizer.token_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str]:
        if isinstance(ids, int):
            return self._tokenizer.token(ids)
        return [self._tokenizer.token(token_id) for token_id in ids]

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary as its file spells it, added tokens included."""
        return self._tokenizer.vocabulary()

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> Any:
        """Token ids of a conversation's prompt, or with `tokenize=False` its text; for several, a list of such.

        `variables` are the template's own, such as `enable_thinking`. Raises `RequestError`.
        """
        _refuse_others("apply_chat_template()", {k: variables.pop(k) for k in _NO_EFFECT.keys() & variables.keys()})
        if conversation and isinstance(conversation[0], Sequence):
            options = {
                "tokenize": tokenize,
                "add_generation_prompt": add_generation_prompt,
                "tools": tools,
                **variables,
            }
            return [self.apply_chat_template(one, chat_template=chat_template, **options) for one in conversation]  # type: ignore[arg-type]
        template = self._template
        if chat_template is not None:
            template = ChatTemplate(chat_template, self._tokenizer.special_tokens)
        if template is None:
            raise RequestError("this model has no chat template: give one with chat_template=")
        documents = variables.pop("documents", None)
        continue_final_message = bool(variables.pop("continue_final_message", False))
        prompt = template.prompt(
            conversation,  # type: ignore[arg-type]
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=variables,
        )
        return self.encode(prompt, add_special_tokens=False) if tokenize else prompt

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this tokenizer has no {name}: transformers.AutoTokenizer.from_pretrained(FOLDER) has all that there is"
        )


def _refuse_others(call: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not any(value is one for one in _NO_EFFECT.get(name, ())):
            raise RequestError(f"{call} does not take {name}={value!r:.40} here: it gives lists", param=name)
