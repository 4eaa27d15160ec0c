"""Check that a template writes every part of a conversation.

A template without tool support silently drops tool calls, which would train a model on empty
answers.
"""

from collections.abc import Callable

from infinitevl_jax.errors import InfiniteVLError

# ids that link calls and results; templates need not write them
LINKS = ("id", "type", "index", "tool_call_id")


class _StandIns:
    """Replaces texts and numbers by unique numbers that identify their part.

    The part named `other` gets a different number.
    """

    def __init__(self, other: str | None = None):
        self.names: dict[str, str] = {}
        self.other = other

    def one(self, where: str) -> str:
        digits = str(7_391_000_000_000_000 + len(self.names))
        self.names[digits] = where
        return digits if where != self.other else digits[::-1]

    def replace(self, value, where: str):
        """Replace the leaves of a part; the key, if a value has no text (null, empty)."""
        if isinstance(value, str):
            return self.one(where) if value.strip() else value
        if isinstance(value, bool):  # cannot become a number: `other` is negated
            self.one(where)
            return value ^ (where == self.other)
        if isinstance(value, int | float):
            return int(self.one(where))
        if isinstance(value, list):
            return [self.replace(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, dict):
            return {
                self.one(f"{where}.{key}") if _has_no_text(item) else key: self.replace(
                    item, f"{where}.{key}"
                )
                for key, item in value.items()
            }
        return value

    def message(self, message: dict, where: str) -> dict:
        out = {}
        for key, value in message.items():
            spot = f"{where}.{key}"
            if key == "content" and isinstance(value, list):
                value = [
                    (
                        {**part, "text": self.replace(part["text"], f"{spot}[{i}]")}
                        if part["type"] == "text"
                        else part
                    )
                    for i, part in enumerate(value)
                ]
            elif key == "tool_calls" and isinstance(value, list):
                value = [self.call(call, f"{spot}[{i}]") for i, call in enumerate(value)]
            elif key == "content":
                value = self.replace(value, where)
            elif key != "role" and key not in LINKS:
                value = self.replace(value, spot)
            out[key] = value
        return out

    def call(self, call: dict, where: str) -> dict:
        out = {
            key: value if key in LINKS else self.replace(value, f"{where}.{key}")
            for key, value in call.items()
            if key != "function"
        }
        return out | (
            {"function": self.replace(call["function"], f"{where}.function")}
            if "function" in call
            else {}
        )

    def tool(self, tool: dict, where: str) -> dict:
        inner = tool.get("function", tool)
        named = {
            **inner,
            **{
                key: self.replace(inner[key], f"{where}.{key}")
                for key in ("name", "description")
                if key in inner
            },
        }
        return {**tool, "function": named} if "function" in tool else named


def _has_no_text(value) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def check_traces(
    render: Callable[[list[dict], list[dict] | None], str],
    messages: list[dict],
    tools: list[dict] | None,
    where: str,
    source: str,
    first: int = 0,
) -> None:
    """Raise InfiniteVLError for the first part that `render` omits.

    Args:
      render: text of messages and tools.
      messages, tools: plain data.
      where: name of the messages, for errors.
      source: name of the template, for errors.
      first: index of the first message to check.
    """

    def shown(stand_ins: _StandIns) -> str:
        changed = [
            stand_ins.message(m, f"{where}[{i}]") if i >= first else m
            for i, m in enumerate(messages)
        ]
        return render(
            changed,
            (
                None
                if tools is None
                else [stand_ins.tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
            ),
        )

    stand_ins = _StandIns()
    try:
        text = shown(stand_ins)
    except InfiniteVLError:  # a template that interprets values; it accepted the real ones
        return
    for digits, name in stand_ins.names.items():
        # a template may write only some of the numbers
        if digits not in text and shown(_StandIns(other=name)) == text:
            raise InfiniteVLError(
                f"{name} is not in the text that chat template {source} writes, so the model would"
                " never see it",
                "use a template that writes it (for tools the checkpoint's own"
                " chat_template.jinja), put it into the content as text, or leave it out",
            )
