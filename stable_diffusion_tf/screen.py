"""What may be shown on a terminal."""

import re


def printable(text: str) -> str:
    """A stranger's text for the screen: what could steer a terminal, as escapes."""
    steering = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(steering, lambda match: ascii(match[0])[1:-1], text)
