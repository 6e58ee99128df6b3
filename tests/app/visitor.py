"""A visitor of the app without a browser: what the page's script sends, and what comes back."""

import json
import secrets
from pathlib import Path
from typing import Any

import httpx


class Visitor:
    """
    One tab.

    Args:
        address: of the page.
    """

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=address.rstrip("/"), timeout=120, trust_env=False)
        self.session = secrets.token_hex(8)
        self.config = self.http.get("/config").json()

    def upload(self, file: Path) -> dict[str, Any]:
        """What the page then says of the file."""
        answer = self.http.post("/gradio_api/upload", files={"files": (file.name, file.read_bytes(), "image/png")})
        answer.raise_for_status()
        (path,) = answer.json()
        return {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}

    def call(self, name: str, *data: Any) -> list[Any]:
        """
        The values that an event of the page ends with.

        Raises:
            RuntimeError: an error is shown, with its text.
        """
        (event,) = [dep["id"] for dep in self.config["dependencies"] if dep["api_name"] == name]
        question = {"data": list(data), "fn_index": event, "session_hash": self.session}
        joined = self.http.post("/gradio_api/queue/join", json=question)
        if joined.status_code != 200:
            raise RuntimeError(f"{joined.status_code}: {joined.text.strip()}")
        values: list[Any] = []
        with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as stream:
            for line in stream.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] == "process_generating":
                    values = message["output"].get("data", values)
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(str(message["output"].get("error")))
                    return values if message["output"].get("data") is None else message["output"]["data"]
        raise RuntimeError("The stream ended without an answer.")

    def ask(self, picture: dict[str, Any] | None, tags: list[str], **options: Any) -> list[Any]:
        """The button "Segment": the result, the legend, the times, the pixel's text, and what hovering tells."""
        defaults = {"preset": "", "expansion": "", "threshold": 0, "model": "tiny", "view": "mask", "opacity": 0.5}
        return self.call("segment", picture, tags, *(defaults | options).values())
