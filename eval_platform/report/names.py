"""How is a checkpoint called on a board? By its key, and asked as a conversation it is another line."""

from collections.abc import Mapping
from typing import Any


def called(row: Mapping[str, Any], name: str = "key") -> str:
    """`row[name]`, marked where the row's score is of a chat: that is never in one line with what is of none."""
    return f"{row[name]} (chat)" if row.get("chat") else str(row[name])
