"""Requests that no page of ours sends: too large ones, and those that would have the server fetch something."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Of a question; uploads have a limit of their own.
MOST_BYTES = 1 << 20


class GuardedRequests:
    """
    ASGI middleware for all requests but uploads, whose size Gradio bounds. It refuses bodies of more than `MOST_BYTES`,
    and files in them that are addresses, or content in place of a file: Gradio would fetch and decode them before any
    function of ours is asked.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False) and message["type"] == "http.request"
            if len(body) > MOST_BYTES:
                await _refuse(send, 413, "The request is too large.")
                return
        if names_no_upload(body):
            await _refuse(send, 403, "Addresses and contents of pictures are not taken here: upload the picture.")
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)


def names_no_upload(body: bytes) -> bool:
    """Whether a JSON body has a file, {"path": ..., "url": ...}, that is an address or a content."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # not for Gradio's components either
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path")) or str(value.get("url")).lower().startswith("data:"):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


async def _refuse(send: Send, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
