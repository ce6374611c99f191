# Made from char_tokenizer.py by scripts/patched.py (make prepare).
from typing import Any, ClassVar
from collections.abc import Iterable
from fastcore.basics import patch

__all__ = ['CharacterTokenizer']
class CharacterTokenizer:
    chars: list[str]
    vocab_size: Any
    source: str
    stoi: Any
    itos: Any

    def __init__(self, text: str, source: str='the text that the tokenizer was made from'): ...

    @classmethod
    def from_vocab(cls, chars: Iterable[str], source: str='the vocabulary given') -> 'CharacterTokenizer': ...

    def _use(self, chars: list[str], source: str): ...

    def __eq__(self, other: object) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...
